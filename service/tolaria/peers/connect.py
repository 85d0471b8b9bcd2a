"""Both peers, ready to be called: channels, breakers, deadlines and telemetry put together.

Owns the channels. Must not know when peers are called.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import grpc.aio

from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CircuitBreakerState
from tolaria.config import PeerSettings
from tolaria.peers.calls import Peer, call_recorder
from tolaria.peers.channel import peer_channel
from tolaria.peers.kasmina import KasminaClient
from tolaria.peers.tamiyo import TamiyoClient
from tolaria.resilience.breaker import Breaker, BreakerPolicy
from tolaria.resilience.deadline import DeadlineCaller
from tolaria.telemetry import events
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Peers:
    """The clients, and the breaker that each is called through."""

    tamiyo: TamiyoClient
    kasmina: KasminaClient
    breakers: dict[Peer, Breaker]


@asynccontextmanager
async def connected_peers(
    tamiyo: PeerSettings,
    kasmina: PeerSettings,
    *,
    metrics: Metrics,
    emitter: Emitter,
    on_breaker: Callable[[], None],
    policy: BreakerPolicy | None = None,
) -> AsyncIterator[Peers]:
    """Clients for both peers while the block runs; connections are begun at once.

    Args:
        tamiyo: its target must be set.
        kasmina: likewise.
        metrics: for calls and breakers.
        emitter: for events of both.
        on_breaker: called after a breaker has changed its state.
        policy: how patient both breakers are; None: as patient as breakers are by themselves.
    """

    def breaker_changed(name: str, state: CircuitBreakerState.ValueType) -> None:
        metrics.breaker_state.labels(name).set(state)
        if state == CIRCUIT_STATE_OPEN:
            emitter.emit(events.BREAKER_OPENED, breaker=name)
        elif state == CIRCUIT_STATE_CLOSED:
            emitter.emit(events.BREAKER_CLOSED, breaker=name)
        on_breaker()

    breakers: dict[Peer, Breaker] = {}
    callers: dict[Peer, DeadlineCaller] = {}
    names: tuple[Peer, ...] = ("tamiyo", "kasmina")
    for name in names:
        breakers[name] = Breaker(name, clock=time.monotonic, policy=policy, on_change=breaker_changed)
        callers[name] = DeadlineCaller(name, breakers[name], observe=call_recorder(name, metrics, emitter))
        metrics.breaker_state.labels(name).set(CIRCUIT_STATE_CLOSED)
    async with _channel(tamiyo.target) as tamiyo_channel, _channel(kasmina.target) as kasmina_channel:
        yield Peers(
            TamiyoClient(tamiyo_channel, callers["tamiyo"], timeout_s=tamiyo.timeout_s),
            KasminaClient(kasmina_channel, callers["kasmina"], timeout_s=kasmina.timeout_s),
            breakers,
        )


@asynccontextmanager
async def _channel(target: str) -> AsyncIterator[grpc.aio.Channel]:
    channel = peer_channel(target)
    # Connect now: the first boundary has no time for it.
    channel.get_state(try_to_connect=True)
    try:
        yield channel
    finally:
        with anyio.CancelScope(shield=True):
            await channel.close()
