"""What becomes of call records: metrics and events for each peer, from one table.

Must not know what the calls ask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import Counter, Gauge

from tolaria.resilience.deadline import CallRecord
from tolaria.telemetry import events
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.events import EventSpec
from tolaria.telemetry.metrics import Metrics

Peer = Literal["tamiyo", "kasmina"]


@dataclass(frozen=True, slots=True)
class _PeerTelemetry:
    timeouts: Counter
    last_ms: Gauge
    on_timeout: tuple[EventSpec, ...]
    on_error: tuple[EventSpec, ...]


def call_recorder(peer: Peer, metrics: Metrics, emitter: Emitter) -> Callable[[CallRecord], None]:
    """The `observe` of a `DeadlineCaller` for one peer."""
    telemetry = {
        "tamiyo": _PeerTelemetry(
            metrics.timeout_tamiyo_total,
            metrics.timeout_tamiyo_last_ms,
            (events.TAMIYO_TIMEOUT, events.TIMEOUT_INFERENCE),
            (events.TAMIYO_ERROR,),
        ),
        "kasmina": _PeerTelemetry(
            metrics.timeout_kasmina_total,
            metrics.timeout_kasmina_last_ms,
            (events.KASMINA_TIMEOUT,),
            (events.KASMINA_ERROR,),
        ),
    }[peer]

    def record(call: CallRecord) -> None:
        latency_ms = call.duration_s * 1000
        metrics.peer_call_duration_seconds.labels(peer, call.method, call.outcome).observe(call.duration_s)
        if call.outcome not in {"skipped", "abandoned"}:
            telemetry.last_ms.set(latency_ms)
        if call.outcome == "timeout":
            telemetry.timeouts.inc()
        happened = {"timeout": telemetry.on_timeout, "error": telemetry.on_error}.get(call.outcome, ())
        for spec in happened:
            emitter.emit(spec, method=call.method, detail=call.detail, latency_ms=latency_ms)

    return record
