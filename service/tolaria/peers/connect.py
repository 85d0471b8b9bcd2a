"""Connected clients of both peers: channels, circuit breakers, deadlines and telemetry put together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, TypeAlias, get_args

import anyio
import anyio.to_thread
import grpc
import grpc.aio

from tolaria.config import Address, PeerSettings
from tolaria.peers.clients import ROLLBACK_METHODS, KasminaClient, RollbackClient, TamiyoClient
from tolaria.resilience.breaker import Breaker
from tolaria.resilience.deadline import CallRecord, DeadlineCaller, Outcome
from tolaria.security.certificates import TlsFiles
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter, EventSpec
from tolaria.telemetry.metrics import Metrics, start_at_zero
from tolaria.values.spans import KIND

Peer: TypeAlias = Literal["tamiyo", "kasmina"]

_RESPONSE_BYTES_MAX = 4 * 1024 * 1024
_CHANNEL_OPTIONS = [
    # gRPC's own backoff grows to two minutes, for which a peer that has restarted would be unreachable.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", _RESPONSE_BYTES_MAX),
    ("grpc.enable_retries", 0),
]
_EVENTS: dict[tuple[Peer, Outcome], tuple[EventSpec, ...]] = {
    ("tamiyo", "timeout"): (events.TAMIYO_TIMEOUT, events.TIMEOUT_INFERENCE),
    ("tamiyo", "error"): (events.TAMIYO_ERROR,),
    ("tamiyo", "refused"): (events.TAMIYO_ERROR,),
    ("kasmina", "timeout"): (events.KASMINA_TIMEOUT,),
    ("kasmina", "error"): (events.KASMINA_ERROR,),
    ("kasmina", "refused"): (events.KASMINA_ERROR,),
}


@dataclass(frozen=True, slots=True)
class Peers:
    """The clients. Those of one peer share its channel, circuit breaker and limits."""

    tamiyo: TamiyoClient
    kasmina: KasminaClient
    tamiyo_rollback: RollbackClient
    kasmina_rollback: RollbackClient
    callers: Mapping[Peer, DeadlineCaller] = field(default_factory=dict)


@asynccontextmanager
async def connected_peers(
    tamiyo: PeerSettings,
    kasmina: PeerSettings,
    *,
    breakers: Mapping[str, Breaker],
    metrics: Metrics,
    emitter: Emitter,
) -> AsyncIterator[Peers]:
    """Connects to both peers at once, through the circuit breaker of each, while the block runs.

    At the end new calls are refused, and calls in flight are cancelled after each peer's `drain_s`. Both settings must
    have a target. Raises CredentialsError when a file of certificates cannot be used.
    """

    def caller_of(peer: Peer, settings: PeerSettings) -> DeadlineCaller:
        methods = (*settings.methods, *ROLLBACK_METHODS)
        start_at_zero(metrics.peer_retries_total, ((peer, method) for method in methods))
        series = product((peer,), methods, get_args(Outcome))
        start_at_zero(metrics.peer_call_duration_seconds, series)
        return DeadlineCaller(peer, breakers[peer], settings, observe=_observer(peer, metrics, emitter))

    tamiyo_caller, kasmina_caller = caller_of("tamiyo", tamiyo), caller_of("kasmina", kasmina)
    async with (
        _channel("tamiyo", tamiyo) as tamiyo_channel,
        _channel("kasmina", kasmina) as kasmina_channel,
        _drained((tamiyo_caller, tamiyo.drain_s), (kasmina_caller, kasmina.drain_s)),
    ):
        yield Peers(
            tamiyo=TamiyoClient(tamiyo_channel, tamiyo_caller),
            kasmina=KasminaClient(kasmina_channel, kasmina_caller),
            tamiyo_rollback=RollbackClient(tamiyo_channel, tamiyo_caller),
            kasmina_rollback=RollbackClient(kasmina_channel, kasmina_caller),
            callers={"tamiyo": tamiyo_caller, "kasmina": kasmina_caller},
        )


def _observer(peer: Peer, metrics: Metrics, emitter: Emitter) -> Callable[[CallRecord], None]:
    """Returns the function that turns the records of one peer's calls into metrics and events."""
    is_tamiyo = peer == "tamiyo"
    timeouts = metrics.timeout_tamiyo_total if is_tamiyo else metrics.timeout_kasmina_total
    last_ms = metrics.timeout_tamiyo_last_ms if is_tamiyo else metrics.timeout_kasmina_last_ms

    def observe(call: CallRecord) -> None:
        latency_ms = call.duration_s * 1000
        metrics.peer_call_duration_seconds.labels(peer, call.method, call.outcome).observe(call.duration_s)
        if call.retries:
            metrics.peer_retries_total.labels(peer, call.method).inc(call.retries)
        if call.outcome not in {"skipped", "refused", "abandoned"}:
            last_ms.set(latency_ms)
        if call.outcome == "timeout":
            timeouts.inc()
        if call.span is not None:
            error = call.detail or ("" if call.outcome == "ok" else call.outcome)
            attributes: dict[str, str | float] = {KIND: "client", "outcome": call.outcome, "retries": call.retries}
            emitter.tracer.record(call.span, f"{peer}/{call.method}", call.duration_s, error, **attributes)
        for spec in _EVENTS.get((peer, call.outcome), ()):
            emitter.emit(spec, method=call.method, detail=call.detail, latency_ms=latency_ms)

    return observe


@asynccontextmanager
async def _drained(*callers: tuple[DeadlineCaller, float]) -> AsyncIterator[None]:
    """Drains all callers at the end, concurrently, each within its own timeout in seconds, even if cancelled."""
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                for caller, timeout_s in callers:
                    tasks.start_soon(caller.drain, timeout_s)


@asynccontextmanager
async def _channel(peer: Peer, settings: PeerSettings) -> AsyncIterator[grpc.aio.Channel]:
    # A proxy from the environment cannot reach ports of this machine. For other targets gRPC honours it, and no_proxy.
    options: list[tuple[str, Any]] = [*_CHANNEL_OPTIONS]
    if Address.parse(settings.target).is_loopback:
        options.append(("grpc.enable_http_proxy", 0))
    if settings.tls_ca:
        if settings.tls_name:
            options.append(("grpc.ssl_target_name_override", settings.tls_name))
        files = tls_files(peer, settings)
        identity, _ = await anyio.to_thread.run_sync(files.read)
        credentials = grpc.ssl_channel_credentials(identity.authorities, identity.key or None, identity.chain or None)
        channel = grpc.aio.secure_channel(settings.target, credentials, options=options)
    else:
        channel = grpc.aio.insecure_channel(settings.target, options=options)
    # Connect now, since the first epoch boundary has no time for it.
    channel.get_state(try_to_connect=True)
    try:
        yield channel
    finally:
        with anyio.CancelScope(shield=True):
            await channel.close()


def tls_files(peer: Peer, settings: PeerSettings) -> TlsFiles:
    """Returns the files with which a peer is called."""
    return TlsFiles(peer, settings.tls_cert, settings.tls_key, settings.tls_ca, authorities_setting="tls_ca")
