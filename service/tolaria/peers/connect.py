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
from tolaria.peers.rollback_client import RollbackClient
from tolaria.peers.tamiyo import TamiyoClient
from tolaria.resilience.breaker import Breaker
from tolaria.resilience.deadline import DeadlineCaller
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Peers:
    """The clients; those of one peer share its channel, its breaker and its bounds."""

    tamiyo: TamiyoClient
    kasmina: KasminaClient
    tamiyo_rollback: RollbackClient
    kasmina_rollback: RollbackClient


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

    At the end further calls are refused; those in flight have each peer's `drain_s` before they are cancelled.

    Args:
        tamiyo: its target must be set.
        kasmina: likewise.
        breakers: by peer, the one that it is called through.
        metrics: for calls.
        emitter: for their events.
    """

    def caller_of(name: Peer, settings: PeerSettings) -> DeadlineCaller:
        return DeadlineCaller(name, breakers[name], settings, observe=call_recorder(name, metrics, emitter))

    tamiyo_caller, kasmina_caller = caller_of("tamiyo", tamiyo), caller_of("kasmina", kasmina)
    async with (
        _channel(tamiyo.target) as tamiyo_channel,
        _channel(kasmina.target) as kasmina_channel,
        _drained((tamiyo_caller, tamiyo.drain_s), (kasmina_caller, kasmina.drain_s)),
    ):
        yield Peers(
            tamiyo=TamiyoClient(
                tamiyo_channel,
                tamiyo_caller,
                epoch_timeout_s=tamiyo.timeout_of("EvaluateEpoch"),
                step_timeout_s=tamiyo.timeout_of("EvaluateStep"),
            ),
            kasmina=KasminaClient(
                kasmina_channel,
                kasmina_caller,
                apply_timeout_s=kasmina.timeout_of("ApplyCommand"),
                export_timeout_s=kasmina.timeout_of("ExportSeedStates"),
            ),
            tamiyo_rollback=RollbackClient(tamiyo_channel, tamiyo_caller),
            kasmina_rollback=RollbackClient(kasmina_channel, kasmina_caller),
        )


@asynccontextmanager
async def _drained(*callers: tuple[DeadlineCaller, float]) -> AsyncIterator[None]:
    """Drain all callers at the end, at the same time, each for at most its seconds, whatever is cancelled."""
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                for caller, timeout_s in callers:
                    tasks.start_soon(caller.drain, timeout_s)


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
