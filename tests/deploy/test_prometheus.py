"""deploy/prometheus: rules checked by promtool, by the catalogue of metrics and by the runbook."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from support.prometheus import (
    PROMETHEUS,
    ROOT,
    RULES,
    alerts,
    groups,
    names_in,
    read_yaml,
    recorded,
    tool,
    unknown_labels,
    unknown_names,
)
from tolaria.config import Settings
from tolaria.telemetry import events

TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
ISSUES = ("tolaria_epochs_failed", "_ms")
"""What `promtool check metrics` objects to in names that stay: a counter without `_total`, and milliseconds."""


def expressions() -> dict[str, str]:
    """The expressions of all rules by their name."""
    return {name: rule["expr"] for name, rule in alerts().items()} | recorded()


@pytest.mark.parametrize("version", [2, 3])
def test_rules_are_valid(version: int) -> None:
    """Both major versions accept all rules."""
    done = subprocess.run(
        [tool(version, "promtool"), "check", "rules", "--lint-fatal", *RULES],
        check=False,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_is_valid_for_prometheus_3_and_after_one_change_for_2(tmp_path: Path) -> None:
    """As its first comment says."""
    shipped = PROMETHEUS / "prometheus.yml"
    older = "".join(line for line in shipped.read_text().splitlines(keepends=True) if "escaping_scheme:" not in line)
    (tmp_path / "prometheus.yml").write_text(older)
    (tmp_path / "rules").symlink_to(PROMETHEUS / "rules")

    for version, path in ((3, shipped), (2, tmp_path / "prometheus.yml")):
        done = subprocess.run(
            [tool(version, "promtool"), "check", "config", path], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("version", [2, 3])
def test_alerts_fire_and_stay_quiet(version: int, path: Path, request: pytest.FixtureRequest) -> None:
    """The unit tests of the rules pass; with Prometheus 2 some only, unless with --long."""
    if version == 2 and path.stem not in {"peers", "telemetry"} and not request.config.getoption("--long"):
        pytest.skip("with Prometheus 2 only with --long")
    done = subprocess.run(
        [tool(version, "promtool"), "test", "rules", path], check=False, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_seen_to_fire_and_to_stay_quiet() -> None:
    """Each has a unit test of both, in data made for it."""
    seen = defaultdict(set)
    for path in TESTS:
        for test in read_yaml(path)["tests"]:
            for check in test["promql_expr_test"]:
                for name in re.findall(r'alertname="(\w+)"', check["expr"]):
                    seen[name].add(bool(check["exp_samples"]))

    assert seen == {name: {False, True} for name in alerts()}


def test_a_broken_rule_fails_its_test(tmp_path: Path) -> None:
    """An alert that looks at the wrong label is noticed."""
    (tmp_path / "rules").mkdir()
    (tmp_path / "tests").mkdir()
    for path in (*RULES, PROMETHEUS / "tests" / "telemetry.yml"):
        broken = path.read_text().replace("increase(tolaria_telemetry_dropped_total{", "increase(tolaria_other_total{")
        (tmp_path / path.parent.name / path.name).write_text(broken)
    command = f"{tool(3, 'promtool')} test rules {tmp_path / 'tests' / 'telemetry.yml'}"

    done = subprocess.run(command.split(), check=False, capture_output=True, text=True)

    assert done.returncode != 0
    assert "TolariaCriticalTelemetryLost" in done.stdout + done.stderr


def test_every_metric_is_in_the_catalogue() -> None:
    """Names of metrics and of recording rules in all expressions exist, and so do the labels of selectors."""
    unknown = {name: unknown_names(text) | unknown_labels(text) for name, text in expressions().items()}

    assert {name: found for name, found in unknown.items() if found} == {}


def test_the_check_of_names_notices_mistakes() -> None:
    """A wrong name, a wrong recording rule and a wrong label are found."""
    assert unknown_names("rate(tolaria_training_stepp[5m]) + tolaria:stepps:rate5m") == {
        "tolaria_training_stepp",
        "tolaria:stepps:rate5m",
    }
    assert unknown_labels('tolaria_breaker_state{braker="tamiyo", job="tolaria"}') == {"tolaria_breaker_state{braker}"}


def test_the_runbook_names_settings_and_events_that_exist() -> None:
    """Whatever it names in code as `section.field` or `tolaria.event`."""
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    sections = Settings.model_fields
    known = {spec.name for spec in vars(events).values() if isinstance(spec, events.EventSpec)}

    for section, field in re.findall(r"`([a-z]+)\.([a-z_]+)[` ]", text):
        if section in sections:
            assert field in type(getattr(Settings(), section)).model_fields, f"{section}.{field}"
    named = set(re.findall(r"`(tolaria\.[a-z_.]+)`", text))
    assert named
    assert named <= known


def test_recording_rules_are_used() -> None:
    """Each by another rule or a dashboard."""
    dashboards = [path.read_text() for path in (ROOT / "deploy" / "grafana").rglob("*.json")]
    texts = [*expressions().values(), *dashboards]

    assert [name for name in recorded() if not any(name in text for text in texts)] == []


def test_alerts_are_many_and_named_alike() -> None:
    """At least twenty, with a prefix that no other program has, in groups of the same prefix."""
    assert len(alerts()) >= 20
    assert all(name.startswith("Tolaria") for name in alerts())
    assert all(group["name"].startswith("tolaria_") for group in groups())


@pytest.mark.parametrize("name", sorted(alerts()))
def test_alert_says_what_it_means(name: str) -> None:
    """Severity, summary, description with the instance, and a section of the runbook that says what to do."""
    rule = alerts()[name]
    annotations = rule["annotations"]
    page, _, anchor = annotations["runbook_url"].partition("#")

    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert "{{ $labels.instance }}" in annotations["summary"]
    assert annotations["description"].endswith(".")
    assert anchor == name.lower()
    sections = (ROOT / page).read_text(encoding="utf-8").split("\n### ")
    (section,) = [text for text in sections if text.splitlines()[0] == name]
    assert f"Severity: {rule['labels']['severity']}." in section
    assert len(section) > 200, "it says what the alert means and what to do"


def test_the_runbook_has_no_section_without_an_alert() -> None:
    """A section whose alert was renamed would be found by no link."""
    headings = re.findall(r"^### (Tolaria\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)

    assert sorted(headings) == sorted(alerts())


def test_alerts_on_states_that_stay_ask_whether_the_run_is_running() -> None:
    """Values of the last step or epoch stay when a run is paused or has ended."""
    staying = {"tolaria_mode_conservative", "tolaria_breaker_state", "tolaria_grad_agg_pair_conflict_ratio"}
    staying |= {"tolaria_checkpoint_age_seconds", "tolaria_lr_controller_factor", "tolaria_lane_up"}
    staying |= {"tolaria_training_last_step_timestamp_seconds"}
    asks = {"tolaria_training_state", "tolaria_lane_phase"}

    found = {name for name, rule in alerts().items() if names_in(rule["expr"]) & staying}

    assert {name for name in found if not names_in(alerts()[name]["expr"]) & asks} == set()


def test_promtool_objects_to_kept_names_only(tmp_path: Path) -> None:
    """`promtool check metrics` finds nothing in an exposition but names that are an API by now."""
    from prometheus_client import generate_latest

    from tolaria.telemetry.metrics import Metrics, with_counters

    text = with_counters(generate_latest(Metrics().registry)).decode()
    for version in (2, 3):
        done = subprocess.run(
            [tool(version, "promtool"), "check", "metrics"], input=text, check=False, capture_output=True, text=True
        )
        lines = (done.stdout + done.stderr).splitlines()
        assert [line for line in lines if line and not any(word in line.split()[0] for word in ISSUES)] == []
        assert lines


def test_the_runbook_covers_every_event() -> None:
    """One row for each event of the catalogue, whose links lead to sections."""
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    table = text.split("<!-- events -->\n")[1].split("<!-- /events -->")[0]
    known = {spec.name for spec in vars(events).values() if isinstance(spec, events.EventSpec)}
    known |= {spec.name for spec in events.EMERGENCY_BROADCASTS.values()}

    covered = re.findall(r"^\| `([\w.]+)` \| .{20,} \|$", table, re.MULTILINE)
    assert sorted(covered) == sorted(known)
    anchors = {heading.lower() for heading in re.findall(r"^### (\w+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\(#(\w+)\)", text)) <= anchors
