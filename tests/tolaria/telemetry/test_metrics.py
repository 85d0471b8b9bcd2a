from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client.exposition import choose_encoder

from tolaria.telemetry.metrics import Kind, Metrics

UTF8 = "text/plain;version=1.0.0;escaping=allow-utf-8"


def exposed(metrics: Metrics, accept: str) -> str:
    """What a scraper that accepts these forms gets."""
    encode, _ = choose_encoder(accept)
    return encode(metrics.registry).decode()


def test_no_two_names_collide_when_escaped() -> None:
    """`a.b` and `a_b` would silently be one series to a scraper that asks for underscores."""
    escaped = [re.sub(r"\W", "_", spec.name) for spec in Metrics().catalogue]
    assert len(set(escaped)) == len(escaped)


def test_scrapers_get_the_form_they_ask_for() -> None:
    """Dotted names for UTF-8, underscores for everybody else, the documented names in both."""
    metrics = Metrics()
    metrics.epochs_total.inc()
    metrics.timeout_tamiyo_total.inc()
    dotted, plain = exposed(metrics, UTF8), exposed(metrics, "")
    assert '{"tolaria.epochs.total"} 1.0' in dotted
    assert '{"tolaria.timeout.tamiyo_total"} 1.0' in dotted
    assert "\ntolaria_epochs_total 1.0" in plain
    assert "\ntolaria_timeout_tamiyo_total 1.0" in plain
    assert "_created" not in plain
    assert "total_total" not in plain + dotted


WRITE = r"\.(?:set|inc|observe|info)\("
LABELS = r"(?:\.labels\((?:[^()]|\([^()]*\))*\))?"


def is_written(name: str, sources: Iterable[str]) -> bool:
    """Whether a source writes the metric: through an object of metrics, or by a name that it has given to it."""
    return any(_writes(rf"\b_?metrics\.{name}", source) or _writes_by_alias(name, source) for source in sources)


def _writes(metric: str, source: str) -> bool:
    return re.search(metric + r"\b\s*" + LABELS + WRITE, source) is not None


def _writes_by_alias(name: str, source: str) -> bool:
    aliases = re.findall(rf"^ *([\w.]+) = .*\b_?metrics\.{name}\b", source, re.MULTILINE)
    # A table of gauges is gone through: `for key, gauge in table.items()`.
    members = [
        member
        for alias in aliases
        for member in re.findall(rf"\bfor \w+, (\w+) in {re.escape(alias)}\.items\(\)", source)
    ]
    return any(_writes(rf"(?<![\w.]){re.escape(alias)}", source) for alias in [*aliases, *members])


def test_every_metric_is_written_by_somebody() -> None:
    """A metric in the catalogue that no code sets would be a lie on a dashboard."""
    metrics = Metrics()
    root = Path(__file__).parents[3] / "service" / "tolaria"
    sources = [p.read_text() for p in root.rglob("*.py") if p.name != "metrics.py"]
    attributes = [
        name for name, value in vars(metrics).items() if hasattr(value, "_name") or name.startswith("epochs_")
    ]
    assert len(attributes) == len(metrics.catalogue)
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
def test_only_a_write_counts_as_one(source: str, written: bool) -> None:
    """A metric that is only mentioned, or cleared, or that has another's name in it, is not written."""
    assert is_written("x", [source]) is written


def test_counters_are_named_as_counters() -> None:
    """The client library appends _total to a counter's name; one that would be renamed is refused."""
    with pytest.raises(ValueError, match="_total"):
        Metrics()._counter("things", "Things.")


def test_a_tally_never_goes_down() -> None:
    """Counters without the suffix are gauges to the library and still only go up."""
    with pytest.raises(ValueError, match="only goes up"):
        Metrics().epochs_failed.inc(-1)


def test_every_metric_says_what_it_is() -> None:
    """Each has help, and histograms have buckets in order."""
    for spec in Metrics().catalogue:
        assert spec.help.endswith(".") or "alert" in spec.help, spec.name
        assert (spec.kind is Kind.HISTOGRAM) == bool(spec.buckets)
        assert list(spec.buckets) == sorted(spec.buckets)
