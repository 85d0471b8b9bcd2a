from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client import Counter, Gauge, Histogram, Info
from prometheus_client.exposition import choose_encoder

from tolaria import telemetry
from tolaria.telemetry.metrics import Metrics, Tally, with_counters

OPENMETRICS = "application/openmetrics-text;version=1.0.0"
UTF8 = "text/plain;version=1.0.0;escaping=allow-utf-8"


def exposition(metrics: Metrics, accept: str) -> str:
    """The response to a scrape with this Accept header."""
    encode, _ = choose_encoder(accept)
    return encode(metrics.registry).decode()


def test_escaped_names_are_unique() -> None:
    """`a.b` and `a_b` would be the same series for a scraper without UTF-8 names."""
    escaped = [re.sub(r"\W", "_", family.name) for family in Metrics().registry.collect()]
    assert len(set(escaped)) == len(escaped)


def test_names_are_dotted_or_escaped_by_accept_header() -> None:
    """Scrapers that accept UTF-8 names get dots, others get underscores."""
    metrics = Metrics()
    metrics.epochs_total.inc()
    metrics.timeout_tamiyo_total.inc()
    dotted, plain = exposition(metrics, UTF8), exposition(metrics, "")
    assert '{"tolaria.epochs.total"} 1.0' in dotted
    assert '{"tolaria.timeout.tamiyo_total"} 1.0' in dotted
    assert "\ntolaria_epochs_total 1.0" in plain
    assert "\ntolaria_timeout_tamiyo_total 1.0" in plain
    assert "_created" not in plain
    assert "total_total" not in plain + dotted


WRITE = r"\.(?:set|inc|observe|info|set_function)\("
LABELS = r"(?:\.labels\((?:[^()]|\([^()]*\))*\))?"


def is_written(name: str, sources: Iterable[str]) -> bool:
    """Whether a source writes the metric, as an attribute of `metrics` or through a variable."""
    return any(_writes(rf"\b_?metrics\.{name}", source) or _writes_by_alias(name, source) for source in sources)


def _writes(metric: str, source: str) -> bool:
    return re.search(metric + r"\b\s*" + LABELS + WRITE, source) is not None


def _writes_by_alias(name: str, source: str) -> bool:
    aliases = re.findall(rf"^ *([\w.]+) = .*\b_?metrics\.{name}\b", source, re.MULTILINE)
    # A loop over a table of gauges: `for key, gauge in table.items()`.
    members = [
        member
        for alias in aliases
        for member in re.findall(rf"\bfor \w+, (\w+) in {re.escape(alias)}\.items\(\)", source)
    ]
    return any(_writes(rf"(?<![\w.]){re.escape(alias)}", source) for alias in [*aliases, *members])


def test_each_metric_is_written() -> None:
    """Each metric is set by some other module."""
    metrics = Metrics()
    root = Path(telemetry.__file__).parents[1]
    texts = [p.read_text() for p in root.rglob("*.py") if p.name != "metrics.py"]
    sources = [text for text in texts if "metrics." in text]
    kinds = (Counter, Gauge, Histogram, Info, Tally)
    attributes = [name for name, value in vars(metrics).items() if isinstance(value, kinds)]
    assert len(attributes) == len(list(metrics.registry.collect()))
    assert [name for name in attributes if not is_written(name, sources)] == []


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("self._metrics.x.set(1)", True),
        ("metrics.x.labels(a, b).inc()", True),
        ("metrics.x.labels(name(a), b).inc()", True),
        ("    table = {n: metrics.x.labels(n) for n in names}\nfor n, gauge in table.items():\n    gauge.set(1)", True),
        ("    late = metrics.x if a else metrics.y\n    late.inc()", True),
        ("    late = metrics.x if a else metrics.y", False),
        ("for gauge in (metrics.x, metrics.y):\n    gauge.clear()", False),
        ("self._metrics.x.clear()", False),
        ("progress.x.set(1)", False),
        ("metrics.x_total.inc()", False),
    ],
)
def test_only_writes_are_recognized(source: str, written: bool) -> None:
    """Mentioning or clearing a metric is no write, and neither is writing one with a longer name."""
    assert is_written("x", [source]) is written


@pytest.mark.parametrize(
    ("accept", "types"),
    [
        ("", ("tolaria_epochs_total counter", "tolaria_epochs_failed counter")),
        (UTF8, ('"tolaria.epochs.total" counter', '"tolaria.epochs.failed" counter')),
        (OPENMETRICS, ("tolaria_epochs_total unknown", "tolaria_epochs_failed unknown")),
    ],
)
def test_a_tally_is_a_counter_under_its_own_name(accept: str, types: tuple[str, ...]) -> None:
    """It has the type in plain text; in OpenMetrics a counter of such a name would be an error."""
    encode, content_type = choose_encoder(accept)
    text = encode(Metrics().registry)
    lines = (with_counters(text) if content_type.startswith("text/plain") else text).decode().splitlines()
    assert [f"# TYPE {one}" in lines for one in types] == [True, True]
    assert not [line for line in lines if line.startswith("# TYPE") and line.endswith(" untyped")]


def test_counter_names_end_in_total() -> None:
    """The client library appends _total to a counter's name, so that all others have to be a Tally."""
    metrics = vars(Metrics())
    assert {name for name, value in metrics.items() if isinstance(value, Tally)} == {"epochs_total", "epochs_failed"}
    assert all(name.endswith("_total") for name, value in metrics.items() if isinstance(value, Counter))


def test_tally_does_not_decrease() -> None:
    """A Tally is a gauge for the client library, and increases only."""
    with pytest.raises(ValueError, match="only goes up"):
        Metrics().epochs_failed.inc(-1)


def test_each_metric_has_help() -> None:
    """Help is a sentence."""
    assert [family.name for family in Metrics().registry.collect() if not family.documentation.endswith(".")] == []
