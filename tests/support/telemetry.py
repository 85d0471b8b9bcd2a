"""Packets, and everything that publishes and receives them, without a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from leyline.v1 import enums_pb2 as enums
from leyline.v1.admin_service_pb2 import TELEMETRY_KIND_EVENT, TelemetryKind
from leyline.v1.telemetry_pb2 import TelemetryEvent, TelemetryPacket
from tolaria.config import TelemetrySettings
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.logging import LogContext
from tolaria.telemetry.metrics import Metrics
from tolaria.telemetry.packets import Packets
from tolaria.telemetry.subscriptions import TelemetryStream

PRIORITIES = {
    "normal": (enums.TELEMETRY_LEVEL_INFO, enums.MESSAGE_PRIORITY_NORMAL),
    "high": (enums.TELEMETRY_LEVEL_WARNING, enums.MESSAGE_PRIORITY_HIGH),
    "critical": (enums.TELEMETRY_LEVEL_CRITICAL, enums.MESSAGE_PRIORITY_CRITICAL),
}


@dataclass
class Telemetry:
    """The parts of a service's telemetry, wired as in the service."""

    settings: TelemetrySettings = field(default_factory=TelemetrySettings)
    metrics: Metrics = field(default_factory=Metrics)
    position: LogContext = field(default_factory=lambda: LogContext("run-1", 2, 30))

    def __post_init__(self) -> None:
        self.stream = TelemetryStream(self.settings, self.metrics)
        self.emitter = Emitter()
        self.tracer = self.emitter.tracer
        self.packets = Packets(self.metrics, self.stream, self.position, self.tracer)
        self.emitter.publish_to(self.packets)

    def sample(self, name: str, **labels: str) -> float | None:
        """Returns the value of a metric, by its dotted name with suffix."""
        return self.metrics.registry.get_sample_value(f"tolaria.{name}", labels)

    def publish(
        self, priority: str, name: str = "event", kind: TelemetryKind.ValueType = TELEMETRY_KIND_EVENT
    ) -> TelemetryPacket:
        """Publishes a packet with one event of that name; returns the packet."""
        packet = packet_of(priority, name)
        self.stream.publish(packet, kind)
        return packet


def packet_of(priority: str, *names: str) -> TelemetryPacket:
    """Returns a packet of a priority with an event for each name."""
    level, number = PRIORITIES[priority]
    events = [TelemetryEvent(description=name, level=level) for name in names]
    return TelemetryPacket(packet_id="-".join(names), level=level, priority=number, events=events)
