from __future__ import annotations

import re
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


def test_every_metric_is_written_by_somebody() -> None:
    """A metric in the catalogue that no code sets would be a lie on a dashboard."""
    metrics = Metrics()
    root = Path(__file__).parents[3] / "service" / "tolaria"
    sources = "".join(p.read_text() for p in root.rglob("*.py") if p.name != "metrics.py")
    attributes = [
        name for name, value in vars(metrics).items() if hasattr(value, "_name") or name.startswith("epochs_")
    ]
    assert len(attributes) == len(metrics.catalogue)
    assert [name for name in attributes if f".{name}" not in sources] == []


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
