from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import grpc
import grpc.aio
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, COMMAND_SEED, SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import FakeKasmina, FakeTamiyo, command, serving
from tolaria.config import PeerSettings
from tolaria.errors import PeerError, PeerProtocolError, PeerTimeoutError
from tolaria.peers.connect import Peers, connected_peers
from tolaria.resilience.breaker import Breaker, BreakerPolicy
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio


class Ward:
    """Both clients against one target, with telemetry of their own."""

    def __init__(self, target: str, timeout_s: float = 2.0, policy: BreakerPolicy | None = None) -> None:
        self.metrics = Metrics()
        self.emitter = Emitter()
        self.breakers = {name: Breaker(name, clock=time.monotonic, policy=policy) for name in ("tamiyo", "kasmina")}
        self._settings = PeerSettings(target=target, timeout_s=timeout_s)

    def connected(self) -> AbstractAsyncContextManager[Peers]:
        return connected_peers(
            self._settings, self._settings, breakers=self.breakers, metrics=self.metrics, emitter=self.emitter
        )

    def value(self, name: str, **labels: str) -> float:
        found = self.metrics.registry.get_sample_value(name, labels)
        return 0.0 if found is None else found

    @property
    def events(self) -> list[str]:
        return [event.description for event in self.emitter.recent]


async def no_command(_state: SystemStatePacket) -> AdaptationCommand | None:
    """A controller that is content."""
    return None


async def test_both_peers_answer() -> None:
    """No command is None; a command to Kasmina comes back with her whole desired set."""
    kasmina = FakeKasmina([SeedState(seed_id="a", stage=SEED_STAGE_TRAINING)])
    async with serving(FakeTamiyo(no_command), kasmina) as target:
        ward = Ward(target)
        async with ward.connected() as peers:
            assert await peers.tamiyo.evaluate_epoch(SystemStatePacket(global_step=3)) is None
            applied = await peers.kasmina.apply(command(COMMAND_SEED), SystemStatePacket())
            exported = await peers.kasmina.export_seeds(SystemStatePacket())
    assert applied.applied
    assert [s.seed_id for s in applied.seeds] == [s.seed_id for s in exported] == ["a"]
    assert (
        ward.value("tolaria.peer.call_duration_seconds_count", peer="tamiyo", method="EvaluateEpoch", outcome="ok") == 1
    )
    assert ward.events == []


async def test_a_lying_kasmina_is_a_protocol_error() -> None:
    """Seeds that cannot be meant never get past the client."""
    kasmina = FakeKasmina([SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, risk_score=float("nan"))])
    async with serving(kasmina) as target, Ward(target).connected() as peers:
        with pytest.raises(PeerProtocolError, match="not finite"):
            await peers.kasmina.export_seeds(SystemStatePacket())


async def test_timeouts_are_counted_and_evented_by_peer() -> None:
    """A timeout of Tamiyo shows as tolaria.tamiyo_timeout and timeout_inference, and in its counter."""

    async def never(_state: SystemStatePacket) -> AdaptationCommand | None:
        await anyio.sleep_forever()
        raise AssertionError("forever has ended")

    async with serving(FakeTamiyo(never)) as target:
        ward = Ward(target, timeout_s=0.05)
        async with ward.connected() as peers:
            with pytest.raises(PeerTimeoutError):
                await peers.tamiyo.evaluate_epoch(SystemStatePacket())
    assert ward.value("tolaria.timeout.tamiyo_total") == 1
    assert ward.value("tolaria.timeout.kasmina_total") == 0
    assert ward.value("tolaria.timeout.tamiyo_last_ms") >= 50
    assert ward.events == ["tolaria.tamiyo_timeout", "timeout_inference"]


async def test_a_dead_peer_opens_its_breaker_and_no_other() -> None:
    """Three failures open Tamiyo's breaker, so that she is not called any more; Kasmina's stays closed."""
    ward = Ward("127.0.0.1:1")
    async with ward.connected() as peers:
        for _ in range(4):
            with pytest.raises(PeerError):
                await peers.tamiyo.evaluate_epoch(SystemStatePacket())
    assert ward.breakers["tamiyo"].state == CIRCUIT_STATE_OPEN
    assert ward.breakers["kasmina"].state == CIRCUIT_STATE_CLOSED
    assert ward.events == ["tolaria.tamiyo_error"] * 3


async def test_a_restarted_peer_is_found_again_within_seconds() -> None:
    """The long backoff of gRPC is cut short: once the breaker has cooled down, a peer that is back is called again."""
    async with serving(FakeTamiyo(no_command)) as target:
        ward = Ward(target, policy=BreakerPolicy(failures_max=1, cooldown_s=0.1))
        peers_of = ward.connected()
        peers: Peers = await peers_of.__aenter__()
        await peers.tamiyo.evaluate_epoch(SystemStatePacket())
    port = int(target.rpartition(":")[2])
    with pytest.raises(PeerError):
        await peers.tamiyo.evaluate_epoch(SystemStatePacket())
    assert ward.breakers["tamiyo"].state == CIRCUIT_STATE_OPEN
    async with serving(FakeTamiyo(no_command), port=port):
        with anyio.fail_after(10):
            while True:
                try:
                    await peers.tamiyo.evaluate_epoch(SystemStatePacket())
                    break
                except PeerError:
                    await anyio.sleep(0.05)
        await peers_of.__aexit__(None, None, None)
    assert ward.breakers["tamiyo"].state == CIRCUIT_STATE_CLOSED


class Babbler(grpc.GenericRpcHandler):
    """Answers every method with bytes that are no message."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def babble(_request: bytes, _context: object) -> bytes:
            return b"\xff\xff\xff"

        return grpc.unary_unary_rpc_method_handler(babble)


@asynccontextmanager
async def babbling() -> AsyncIterator[str]:
    """A peer of any kind that talks nonsense; yields host:port."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((Babbler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


ASKING: dict[str, Callable[[Peers], Awaitable[object]]] = {
    "tamiyo": lambda peers: peers.tamiyo.evaluate_epoch(SystemStatePacket()),
    "kasmina": lambda peers: peers.kasmina.export_seeds(SystemStatePacket()),
    "kasmina's apply": lambda peers: peers.kasmina.apply(command(COMMAND_SEED), SystemStatePacket()),
}


@pytest.mark.parametrize("asked", ASKING)
async def test_a_peer_that_talks_nonsense_fails_and_is_left_alone(asked: str) -> None:
    """Bytes that are no message are a protocol error and count as failures: an event each, and the breaker opens."""
    peer = asked.partition("'")[0]
    async with babbling() as target:
        ward = Ward(target, policy=BreakerPolicy(failures_max=2))
        async with ward.connected() as peers:
            for _ in range(2):
                with pytest.raises(PeerProtocolError, match="answered with bytes"):
                    await ASKING[asked](peers)
    assert ward.breakers[peer].state == CIRCUIT_STATE_OPEN
    assert ward.events.count(f"tolaria.{peer}_error") == 2
