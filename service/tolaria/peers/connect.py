"""Both peers, ready to be called: channels, breakers, deadlines and telemetry put together.

Owns the channels. Must not know when peers are called.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import grpc.aio

from tolaria.config import PeerSettings
from tolaria.peers.calls import Peer, call_recorder
from tolaria.peers.channel import peer_channel
from tolaria.peers.kasmina import KasminaClient
from tolaria.peers.tamiyo import TamiyoClient
from tolaria.resilience.breaker import Breaker
from tolaria.resilience.deadline import DeadlineCaller
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Peers:
    """The clients."""

    tamiyo: TamiyoClient
    kasmina: KasminaClient


@asynccontextmanager
async def connected_peers(
    tamiyo: PeerSettings,
    kasmina: PeerSettings,
    *,
    breakers: Mapping[str, Breaker],
    metrics: Metrics,
    emitter: Emitter,
) -> AsyncIterator[Peers]:
    """Clients for both peers while the block runs; connections are begun at once.

    Args:
        tamiyo: its target must be set.
        kasmina: likewise.
        breakers: by peer, the one that it is called through.
        metrics: for calls.
        emitter: for their events.
    """
    names: tuple[Peer, ...] = ("tamiyo", "kasmina")
    callers = {
        name: DeadlineCaller(name, breakers[name], observe=call_recorder(name, metrics, emitter)) for name in names
    }
    async with _channel(tamiyo.target) as tamiyo_channel, _channel(kasmina.target) as kasmina_channel:
        yield Peers(
            TamiyoClient(tamiyo_channel, callers["tamiyo"], timeout_s=tamiyo.timeout_s),
            KasminaClient(kasmina_channel, callers["kasmina"], timeout_s=kasmina.timeout_s),
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
