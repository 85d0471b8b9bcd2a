from __future__ import annotations

from pathlib import Path

import pytest

from leyline.v1.enums_pb2 import TELEMETRY_LEVEL_WARNING
from tolaria.telemetry import events
from tolaria.telemetry.emitter import Emitter


def test_an_occurrence_is_a_leyline_event() -> None:
    """Name, level and attributes arrive in the message; every occurrence has an id of its own."""
    event = events.BREAKER_OPENED.occurrence(breaker="tamiyo")
    assert (event.description, event.level) == ("tolaria.breaker_opened", TELEMETRY_LEVEL_WARNING)
    assert dict(event.attributes) == {"breaker": "tamiyo"}
    assert event.event_id != events.BREAKER_OPENED.occurrence(breaker="tamiyo").event_id


@pytest.mark.parametrize("attributes", [{}, {"braker": "x"}, {"breaker": "x", "more": "y"}])
def test_attributes_are_exactly_those_declared(attributes: dict[str, str]) -> None:
    """An event with other attributes than its declaration is a mistake in the code."""
    with pytest.raises(ValueError, match="breaker_opened carries"):
        events.BREAKER_OPENED.occurrence(**attributes)


def test_names_are_unique() -> None:
    """No two events share a name."""
    names = [spec.name for spec in events.CATALOGUE]
    assert len(set(names)) == len(names) > 5


def test_every_event_is_emitted_by_somebody() -> None:
    """An event in the catalogue that no code emits would be a promise nobody keeps."""
    root = Path(__file__).parents[3] / "service" / "tolaria"
    sources = "".join(p.read_text() for p in root.rglob("*.py") if p.name != "events.py")
    constants = [name for name, value in vars(events).items() if isinstance(value, events.EventSpec)]
    assert [name for name in constants if f"events.{name}" not in sources] == []


def test_the_emitter_keeps_a_bounded_memory() -> None:
    """A storm of events does not grow the memory; the newest are kept."""
    emitter = Emitter()
    for number in range(1000):
        emitter.emit(events.ZERO_SAMPLES, epoch=number)
    assert len(emitter.recent) == 256
    assert emitter.recent[-1].attributes["epoch"] == "999"
