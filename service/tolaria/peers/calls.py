"""What becomes of call records: metrics and events for each peer. Must not know what the calls ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from tolaria.resilience.deadline import CallRecord, Outcome
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter, EventSpec
from tolaria.telemetry.metrics import Metrics

Peer = Literal["tamiyo", "kasmina"]

EVENTS_OF: dict[tuple[Peer, Outcome], tuple[EventSpec, ...]] = {
    ("tamiyo", "timeout"): (events.TAMIYO_TIMEOUT, events.TIMEOUT_INFERENCE),
    ("tamiyo", "error"): (events.TAMIYO_ERROR,),
    ("tamiyo", "refused"): (events.TAMIYO_ERROR,),
    ("kasmina", "timeout"): (events.KASMINA_TIMEOUT,),
    ("kasmina", "error"): (events.KASMINA_ERROR,),
    ("kasmina", "refused"): (events.KASMINA_ERROR,),
}


def call_recorder(peer: Peer, metrics: Metrics, emitter: Emitter) -> Callable[[CallRecord], None]:
    """The `observe` of a `DeadlineCaller` for one peer."""
    is_tamiyo = peer == "tamiyo"
    timeouts = metrics.timeout_tamiyo_total if is_tamiyo else metrics.timeout_kasmina_total
    last_ms = metrics.timeout_tamiyo_last_ms if is_tamiyo else metrics.timeout_kasmina_last_ms

    def record(call: CallRecord) -> None:
        latency_ms = call.duration_s * 1000
        metrics.peer_call_duration_seconds.labels(peer, call.method, call.outcome).observe(call.duration_s)
        if call.retries:
            metrics.peer_retries_total.labels(peer, call.method).inc(call.retries)
        if call.outcome not in {"skipped", "refused", "abandoned"}:
            last_ms.set(latency_ms)
        if call.outcome == "timeout":
            timeouts.inc()
        for spec in EVENTS_OF.get((peer, call.outcome), ()):
            emitter.emit(spec, method=call.method, detail=call.detail, latency_ms=latency_ms)

    return record
