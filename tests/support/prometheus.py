"""Real servers of Prometheus: the programs that scripts/install-tools unpacks, their rules and their HTTP API."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from support.pods import free_port
from support.waiting import wait_for
from tolaria.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
ESCAPING = "  metric_name_escaping_scheme: underscores\n"
PROCESS = frozenset(
    {
        *("process_start_time_seconds", "process_cpu_seconds_total", "process_resident_memory_bytes"),
        *("process_open_fds", "process_max_fds"),
    }
)
"""Metrics of prometheus_client's collector of the process, which are not in the catalogue."""

_NAME = re.compile(r"\b(?:tolaria|process)_[a-z0-9_]+\b")


def tool(version: int, name: str) -> Path:
    """Returns a program of this major version; skips the test without it, and fails it in CI."""
    path = ROOT / ".tools" / f"prometheus-{version}" / "usr" / "bin" / name
    if not path.exists():
        missing = f"{name} of Prometheus {version} is missing: scripts/install-tools unpacks Debian's package"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return path


def read_yaml(path: Path) -> Any:
    """Returns the content of a YAML file."""
    return YAML(typ="safe").load(path)


@cache
def groups() -> list[dict[str, Any]]:
    """All groups of rules that are shipped."""
    return [group for path in RULES for group in read_yaml(path)["groups"]]


def alerts() -> dict[str, dict[str, Any]]:
    """The alerts by name."""
    return {rule["alert"]: rule for group in groups() for rule in group["rules"] if "alert" in rule}


def recorded() -> dict[str, str]:
    """The expressions of the recording rules by name."""
    return {rule["record"]: rule["expr"] for group in groups() for rule in group["rules"] if "record" in rule}


@cache
def catalogue() -> dict[str, set[str]]:
    """The names of all series that Tolaria exports, with underscores, and the labels that each can have."""
    names: dict[str, set[str]] = {}
    registry = Metrics().registry
    for collector, exported in registry._collector_to_names.items():  # noqa: SLF001 - nothing public tells labels
        labels = set(getattr(collector, "_labelnames", ()))
        for name in exported:
            escaped = re.sub(r"\W", "_", name)
            names[escaped] = labels | ({"le"} if escaped.endswith("_bucket") else set())
    names["tolaria_build_info"] = {"version", "torch", "device"}
    return names


def names_in(expression: str) -> set[str]:
    """The metrics that an expression uses; not those of recording rules."""
    return set(_NAME.findall(expression))


def unknown_names(expression: str) -> set[str]:
    """The metrics of an expression that are not in the catalogue, and unknown recording rules."""
    records = set(re.findall(r"\btolaria:[a-z0-9_:]+", expression))
    return (names_in(expression) - set(catalogue()) - PROCESS) | (records - set(recorded()))


def unknown_labels(expression: str) -> set[str]:
    """Selectors of an expression with a label that the metric does not have, as `metric{label}`."""
    found = set()
    for name, selector in re.findall(r"\b(tolaria_[a-z0-9_]+)\{([^}]*)\}", expression):
        for label in re.findall(r"(\w+)\s*[=!]~?", selector):
            if label not in catalogue().get(name, {label}) | {"job", "instance"}:
                found.add(f"{name}{{{label}}}")
    return found


def quickened(rules: str, *, window: str) -> str:
    """Returns rules whose alerts wait for a second, and that look back for `window` only."""
    quick = re.sub(r"for: \d+[smhd]", "for: 1s", rules)
    quick = re.sub(r"\[\d+[smhd]\]", f"[{window}]", quick)
    return re.sub(r"offset \d+[smhd]", f"offset {window}", quick)


class PrometheusServer:
    """A server of Prometheus on loopback, and what it answers."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str, **parameters: str) -> Any:
        """Returns the data of an answer of the HTTP API."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=180) as response:
            return json.load(response)["data"]

    def value(self, expression: str) -> float | None:
        """The value of an expression with one series; None without one."""
        result = self.get("query", query=expression)["result"]
        return float(result[0]["value"][1]) if result else None

    def firing(self) -> set[str]:
        """The names of the alerts that fire."""
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"}

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=2) as response:
                return int(response.status) == 200
        except OSError:
            return False


@contextmanager
def prometheus(
    version: int, target: str, directory: Path, *, escaped: bool = True, window: str = "10s"
) -> Iterator[PrometheusServer]:
    """Runs the shipped configuration against a target, every second, with quickened rules.

    Without `escaped`, names are stored as Prometheus 3 does by default.
    """
    program = tool(version, "prometheus")
    (directory / "rules").mkdir(parents=True)
    for path in RULES:
        (directory / "rules" / path.name).write_text(quickened(path.read_text(), window=window))
    config = (PROMETHEUS / "prometheus.yml").read_text().replace("tolaria:9464", target)
    assert ESCAPING in config
    if version < 3 or not escaped:
        config = config.replace(ESCAPING, "")
    config = re.sub(r"(scrape_interval|scrape_timeout|evaluation_interval): \d+s", r"\1: 1s", config)
    (directory / "prometheus.yml").write_text(config)
    address = f"127.0.0.1:{free_port()}"
    arguments = [f"--web.listen-address={address}", f"--storage.tsdb.path={directory / 'data'}"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, f"--config.file={directory / 'prometheus.yml'}", *arguments], stdout=log, stderr=log
        )
        try:
            server = PrometheusServer(address)
            wait_for(lambda: server.ready() or process.poll() is not None, every_s=0.1)
            assert process.poll() is None, (directory / "log").read_text()
            yield server
        finally:
            process.terminate()
            process.wait(30)
