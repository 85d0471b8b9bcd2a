"""An emitter that records what it emits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tolaria.telemetry.events import Emitter, EventSpec


@dataclass(frozen=True, slots=True)
class EmittedEvent:
    """One emitted event, with its attributes as text; floats have six significant digits."""

    name: str
    attributes: dict[str, str]


class RecordingEmitter(Emitter):
    """Logs events like the Emitter, and keeps them in `events`, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[EmittedEvent] = []

    def emit(
        self, spec: EventSpec, on_delivered: Callable[[], None] | None = None, /, **attributes: str | float
    ) -> None:
        super().emit(spec, on_delivered, **attributes)
        self.events.append(EmittedEvent(spec.name, {name: _text(value) for name, value in attributes.items()}))

    @property
    def names(self) -> list[str]:
        """Names of the events so far."""
        return [event.name for event in self.events]

    def attributes_of(self, name: str) -> list[dict[str, str]]:
        """Attributes of every event of that name."""
        return [event.attributes for event in self.events if event.name == name]


def _text(value: str | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
