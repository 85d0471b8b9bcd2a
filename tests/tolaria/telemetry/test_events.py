from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tolaria import telemetry
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter, EventSpec

CATALOGUE = {name: value for name, value in vars(events).items() if isinstance(value, EventSpec)}


@pytest.mark.parametrize(
    ("spec", "level"),
    [
        (events.BREAKER_CLOSED, "info"),
        (events.BREAKER_OPENED, "warning"),
    ],
)
def test_event_is_logged_at_its_level_with_its_attributes(spec: EventSpec, level: str) -> None:
    """The name of an event is the message of the log line."""
    with capture_logs() as lines:
        Emitter().emit(spec, breaker="tamiyo")
    assert lines == [{"event": spec.name, "breaker": "tamiyo", "log_level": level}]


@pytest.mark.parametrize(("spec", "level"), [(events.CHECKPOINT_FAILED, "error"), (events.HEARTBEAT_LOST, "critical")])
def test_error_and_critical_events_keep_their_level(spec: EventSpec, level: str) -> None:
    """Each level of Leyline has a level of the log."""
    with capture_logs() as lines:
        Emitter().emit(spec, **dict.fromkeys(spec.attributes, "x"))
    assert [line["log_level"] for line in lines] == [level]


def test_only_the_broadcasts_of_high_levels_are_critical() -> None:
    """NOTICE and ELEVATED do not bypass the queue."""
    with capture_logs() as lines:
        for spec in events.EMERGENCY_BROADCASTS.values():
            Emitter().emit(spec, **dict.fromkeys(spec.attributes, "x"))
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("emergency_broadcast", "info"),
        ("emergency_broadcast", "warning"),
        ("emergency_broadcast", "critical"),
        ("emergency_broadcast", "critical"),
    ]


@pytest.mark.parametrize("attributes", [{}, {"braker": "x"}, {"breaker": "x", "more": "y"}])
def test_undeclared_or_missing_attributes_raise(attributes: dict[str, str]) -> None:
    """An event has exactly its declared attributes."""
    with pytest.raises(ValueError, match="breaker_opened carries"):
        Emitter().emit(events.BREAKER_OPENED, **attributes)


def test_event_names_are_unique() -> None:
    """No two events share a name."""
    names = [spec.name for spec in CATALOGUE.values()]
    assert len(set(names)) == len(names) > 5


def test_each_event_is_emitted() -> None:
    """Each event of the catalogue is used by some other module."""
    root = Path(telemetry.__file__).parents[1]
    sources = "".join(path.read_text() for path in root.rglob("*.py") if path.name != "events.py")
    assert [name for name in CATALOGUE if f"events.{name}" not in sources] == []
