"""An emitter that keeps the events it is given."""

from __future__ import annotations

from leyline.v1.telemetry_pb2 import TelemetryEvent
from tolaria.telemetry.events import Emitter, EventSpec


class RecordingEmitter(Emitter):
    """Passes events on and keeps them, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.emitted: list[TelemetryEvent] = []

    def emit(self, spec: EventSpec, **attributes: str | float) -> None:
        """Keeps the event."""
        self.emitted.append(spec.occurrence(**attributes))
        super().emit(spec, **attributes)

    @property
    def names(self) -> list[str]:
        """Names of the events so far."""
        return [event.description for event in self.emitted]

    def attributes_of(self, name: str) -> list[dict[str, str]]:
        """Attributes of every event of that name."""
        return [dict(event.attributes) for event in self.emitted if event.description == name]
