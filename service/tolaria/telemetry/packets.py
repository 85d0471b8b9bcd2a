"""Telemetry packets: one for each event, when it happens, and one for each epoch with all metrics and spans."""

from __future__ import annotations

import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import anyio
import anyio.to_thread
import structlog
from prometheus_client import Metric

from leyline.v1 import enums_pb2 as enums
from leyline.v1.admin_service_pb2 import (
    TELEMETRY_KIND_EMERGENCY,
    TELEMETRY_KIND_EPOCH,
    TELEMETRY_KIND_EVENT,
)
from leyline.v1.telemetry_pb2 import MetricPoint, SystemHealth, TelemetryEvent, TelemetryPacket, TraceSpan
from tolaria.telemetry.logging import LogContext
from tolaria.telemetry.metrics import Metrics, start_at_zero, unit_of
from tolaria.telemetry.subscriptions import TelemetryStream
from tolaria.telemetry.tracing import Tracer

SOURCE: Final = "tolaria"
EPOCHS_WAITING_MAX: Final = 8

_PRIORITIES: Final[Mapping[enums.TelemetryLevel.ValueType, enums.MessagePriority.ValueType]] = {
    enums.TELEMETRY_LEVEL_INFO: enums.MESSAGE_PRIORITY_NORMAL,
    enums.TELEMETRY_LEVEL_WARNING: enums.MESSAGE_PRIORITY_HIGH,
    enums.TELEMETRY_LEVEL_ERROR: enums.MESSAGE_PRIORITY_HIGH,
    enums.TELEMETRY_LEVEL_CRITICAL: enums.MESSAGE_PRIORITY_CRITICAL,
}


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One occurrence of an event: its declaration's name, level and health, and its attributes."""

    name: str
    level: enums.TelemetryLevel.ValueType
    health: enums.HealthStatus.ValueType
    attributes: Mapping[str, str]
    emergency: bool = False


@dataclass(frozen=True, slots=True)
class _Epoch:
    """What is known of an epoch's packet when the epoch is over."""

    at_ns: int
    health: SystemHealth
    spans: list[TraceSpan]


class Packets:
    """Assembles packets and publishes them. Used on the event loop only.

    `position` is where the run is. The metrics of an epoch's packet are read in a thread right after the epoch, which
    takes milliseconds, and only if a subscriber wants them.
    """

    def __init__(self, metrics: Metrics, stream: TelemetryStream, position: LogContext, tracer: Tracer) -> None:
        self._metrics = metrics
        self._stream = stream
        self._position = position
        self._tracer = tracer
        self._worst: enums.HealthStatus.ValueType = enums.HEALTH_STATUS_HEALTHY
        self._counts: Counter[str] = Counter()
        self._over: deque[_Epoch] = deque(maxlen=EPOCHS_WAITING_MAX)
        self._wake = anyio.Event()
        self._one_thread = anyio.CapacityLimiter(1)
        self._log = structlog.get_logger(__name__)
        self._failed = False
        start_at_zero(metrics.telemetry_dropped_total, (("normal",), ("high",), ("critical",)))

    def event(self, occurrence: Occurrence, on_sent: Callable[[], None] | None = None) -> None:
        """Publishes the packet of an event at once; `on_sent` is called each time a subscriber has been sent it."""
        self._worst = max(self._worst, occurrence.health)
        self._counts[occurrence.name] += 1
        kind = TELEMETRY_KIND_EMERGENCY if occurrence.emergency else TELEMETRY_KIND_EVENT
        if self._stream.takes(kind, occurrence.level):
            self._stream.publish(self._packet_of(occurrence), kind, on_sent)

    def epoch_over(self) -> None:
        """Has the packet of the epoch that is over assembled by `serve`, unless no subscriber wants it."""
        worst, counts, spans = self._worst, self._counts, self._tracer.take()
        self._worst, self._counts = enums.HEALTH_STATUS_HEALTHY, Counter()
        if not self._stream.takes(TELEMETRY_KIND_EPOCH, enums.TELEMETRY_LEVEL_INFO):
            return
        summary = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in sorted(counts.items()))
        indicators = self._indicators() | {f"event.{name}": str(count) for name, count in counts.items()}
        health = SystemHealth(status=worst, summary=summary, indicators=indicators)
        if len(self._over) == EPOCHS_WAITING_MAX:
            self._metrics.telemetry_dropped_total.labels("normal").inc()
        self._over.append(_Epoch(time.time_ns(), health, spans))
        self._wake.set()

    async def serve(self) -> None:
        """Assembles and publishes the packets of epochs until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            while self._over:
                assemble = partial(self._packet_of_epoch, self._over.popleft())
                try:
                    packet = await anyio.to_thread.run_sync(assemble, abandon_on_cancel=True, limiter=self._one_thread)
                    self._stream.publish(packet, TELEMETRY_KIND_EPOCH)
                except Exception as error:  # noqa: BLE001 - a metric may raise anything; training needs no packet
                    self._lost(error)

    def _lost(self, error: Exception) -> None:
        """Counts a packet that could not be assembled; the first one is logged."""
        self._metrics.telemetry_dropped_total.labels("normal").inc()
        if not self._failed:
            self._failed = True
            self._log.error("epoch_packet_lost", detail=f"{type(error).__name__}: {error}", exc_info=error)

    def _packet_of(self, occurrence: Occurrence) -> TelemetryPacket:
        health = SystemHealth(status=occurrence.health, summary=occurrence.name, indicators=self._indicators())
        packet = _packet(occurrence.level, time.time_ns(), health)
        packet.events.append(
            TelemetryEvent(
                event_id=uuid.uuid4().hex,
                description=occurrence.name,
                level=occurrence.level,
                attributes=occurrence.attributes,
            )
        )
        return packet

    def _packet_of_epoch(self, epoch: _Epoch) -> TelemetryPacket:
        packet = _packet(enums.TELEMETRY_LEVEL_INFO, epoch.at_ns, epoch.health)
        packet.metrics.extend(points(self._metrics.collected()))
        packet.spans.extend(epoch.spans)
        return packet

    def _indicators(self) -> dict[str, str]:
        position = self._position
        return {"run_id": position.run_id, "epoch": str(position.epoch), "global_step": str(position.step)}


def points(families: Iterable[Metric]) -> Iterator[MetricPoint]:
    """Yields the samples of metrics under their dotted names; of histograms the count and the sum."""
    for family in families:
        for sample in family.samples:
            if not (family.type == "histogram" and sample.name.endswith("_bucket")):
                unit = unit_of(sample.name)
                yield MetricPoint(name=sample.name, value=sample.value, unit=unit, attributes=sample.labels)


def _packet(level: enums.TelemetryLevel.ValueType, at_ns: int, health: SystemHealth) -> TelemetryPacket:
    packet = TelemetryPacket(
        packet_id=uuid.uuid4().hex,
        source_subsystem=SOURCE,
        level=level,
        priority=_PRIORITIES[level],
        system_health=health,
    )
    packet.timestamp.FromNanoseconds(at_ns)
    return packet
