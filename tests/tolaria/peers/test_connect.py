from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
import grpc
import grpc.aio
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, COMMAND_SEED, SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.events import RecordingEmitter
from support.peers import FakeKasmina, FakeParticipant, FakeTamiyo, command, serving
from tolaria.config import KasminaSettings, PeerSettings, TamiyoSettings
from tolaria.errors import CallRefusedError, PeerError, PeerProtocolError, PeerTimeoutError, PeerUnavailableError
from tolaria.peers.connect import Peers, connected_peers
from tolaria.resilience.breaker import Breaker, BreakerPolicy
from tolaria.rollback.protocol import ParticipantRequest
from tolaria.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio


class Clients:
    """Clients of both peers at one target, with separate telemetry and breakers."""

    def __init__(
        self, target: str, timeout_s: float = 2.0, policy: BreakerPolicy | None = None, **settings: Any
    ) -> None:
        self.metrics = Metrics()
        self.emitter = RecordingEmitter()
        self.breakers = {name: Breaker(name, clock=time.monotonic, policy=policy) for name in ("tamiyo", "kasmina")}
        own = settings.pop("timeouts_s", {})
        common = {"target": target, "timeout_s": timeout_s, **settings}
        self._tamiyo = TamiyoSettings(**common, timeouts_s=_of(TamiyoSettings, own))
        self._kasmina = KasminaSettings(**common, timeouts_s=_of(KasminaSettings, own))

    def connected(self) -> AbstractAsyncContextManager[Peers]:
        return connected_peers(
            self._tamiyo, self._kasmina, breakers=self.breakers, metrics=self.metrics, emitter=self.emitter
        )

    def value(self, name: str, **labels: str) -> float:
        found = self.metrics.registry.get_sample_value(name, labels)
        return 0.0 if found is None else found

    def retries(self, peer: str) -> dict[str, float]:
        """Returns the counted retries by method."""
        return {
            sample.labels["method"]: sample.value
            for metric in self.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "tolaria.peer.retries_total" and sample.labels["peer"] == peer
        }

    @property
    def events(self) -> list[str]:
        return [event.name for event in self.emitter.events]


def _of(kind: type[PeerSettings], timeouts_s: dict[str, float]) -> dict[str, float]:
    """Selects the methods of one peer."""
    return {method: seconds for method, seconds in timeouts_s.items() if method in kind.methods}


async def no_command(_state: SystemStatePacket) -> AdaptationCommand | None:
    """Decides on no change."""
    return None


async def test_both_peers_answer() -> None:
    """A missing command is None; Kasmina answers with all desired seeds."""
    kasmina = FakeKasmina([SeedState(seed_id="a", stage=SEED_STAGE_TRAINING)])
    async with serving(FakeTamiyo(no_command), kasmina) as target:
        clients = Clients(target)
        async with clients.connected() as peers:
            assert await peers.tamiyo.evaluate_epoch(SystemStatePacket(global_step=3)) is None
            applied = await peers.kasmina.apply(command(COMMAND_SEED), SystemStatePacket())
            exported = await peers.kasmina.export_seeds(SystemStatePacket())
    assert applied.applied
    assert [s.seed_id for s in applied.seeds] == [s.seed_id for s in exported] == ["a"]
    assert (
        clients.value("tolaria.peer.call_duration_seconds_count", peer="tamiyo", method="EvaluateEpoch", outcome="ok")
        == 1
    )
    assert clients.events == []


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
async def test_peers_on_loopback_are_reached_without_the_proxy(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment is not asked, even without no_proxy; nothing answers at its address here."""
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    for exception in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(exception, raising=False)
    async with serving(FakeTamiyo(no_command)) as target, Clients(target).connected() as peers:
        assert await peers.tamiyo.evaluate_epoch(SystemStatePacket(global_step=3)) is None


async def test_invalid_seeds_are_a_protocol_error() -> None:
    """The client raises for a seed with a number that is not finite."""
    kasmina = FakeKasmina([SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, risk_score=float("nan"))])
    async with serving(kasmina) as target, Clients(target).connected() as peers:
        with pytest.raises(PeerProtocolError, match="not finite"):
            await peers.kasmina.export_seeds(SystemStatePacket())


async def test_timeouts_are_counted_and_emitted_by_peer() -> None:
    """A timeout of Tamiyo shows as tolaria.tamiyo_timeout and timeout_inference, and in its counter."""

    async def never(_state: SystemStatePacket) -> AdaptationCommand | None:
        await anyio.sleep_forever()
        raise AssertionError("unreachable")

    async with serving(FakeTamiyo(never)) as target:
        clients = Clients(target, timeout_s=0.05)
        async with clients.connected() as peers:
            with pytest.raises(PeerTimeoutError):
                await peers.tamiyo.evaluate_epoch(SystemStatePacket())
    assert clients.value("tolaria.timeout.tamiyo_total") == 1
    assert clients.value("tolaria.timeout.kasmina_total") == 0
    assert clients.value("tolaria.timeout.tamiyo_last_ms") >= 50
    assert clients.events == ["tolaria.tamiyo_timeout", "timeout_inference"]


async def test_an_unreachable_peer_opens_only_its_own_breaker() -> None:
    """Three failures open Tamiyo's breaker, so that no call is made; Kasmina's stays closed."""
    clients = Clients("127.0.0.1:1")
    async with clients.connected() as peers:
        for _ in range(4):
            with pytest.raises(PeerError):
                await peers.tamiyo.evaluate_epoch(SystemStatePacket())
    assert clients.breakers["tamiyo"].state == CIRCUIT_STATE_OPEN
    assert clients.breakers["kasmina"].state == CIRCUIT_STATE_CLOSED
    assert clients.events == ["tolaria.tamiyo_error"] * 3


async def test_a_restarted_peer_is_reconnected_within_seconds() -> None:
    """GRPC's backoff is limited: once the breaker has cooled down, a restarted peer is called again."""
    async with serving(FakeTamiyo(no_command)) as target:
        clients = Clients(target, policy=BreakerPolicy(failures_max=1, cooldown_s=0.1))
        peers_of = clients.connected()
        peers: Peers = await peers_of.__aenter__()
        await peers.tamiyo.evaluate_epoch(SystemStatePacket())
    port = int(target.rpartition(":")[2])
    with pytest.raises(PeerError):
        await peers.tamiyo.evaluate_epoch(SystemStatePacket())
    assert clients.breakers["tamiyo"].state == CIRCUIT_STATE_OPEN
    async with serving(FakeTamiyo(no_command), port=port):
        with anyio.fail_after(180):
            while True:
                try:
                    await peers.tamiyo.evaluate_epoch(SystemStatePacket())
                    break
                except PeerError:
                    await anyio.sleep(0.05)
        await peers_of.__aexit__(None, None, None)
    assert clients.breakers["tamiyo"].state == CIRCUIT_STATE_CLOSED


class InvalidResponses(grpc.GenericRpcHandler):
    """Answers every method with bytes that do not decode."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def respond(_request: bytes, _context: object) -> bytes:
            return b"\xff\xff\xff"

        return grpc.unary_unary_rpc_method_handler(respond)


@asynccontextmanager
async def invalid_responses() -> AsyncIterator[str]:
    """Serves responses that do not decode; yields host:port."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((InvalidResponses(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


ORDER = ParticipantRequest("r1", 40, "loss exploded", 2.0)
ASKING: dict[str, Callable[[Peers], Awaitable[object]]] = {
    "tamiyo": lambda peers: peers.tamiyo.evaluate_epoch(SystemStatePacket()),
    "tamiyo's step": lambda peers: peers.tamiyo.evaluate_step(SystemStatePacket()),
    "tamiyo's prepare": lambda peers: peers.tamiyo_rollback.prepare(ORDER),
    "tamiyo's commit": lambda peers: peers.tamiyo_rollback.commit(ORDER),
    "kasmina": lambda peers: peers.kasmina.export_seeds(SystemStatePacket()),
    "kasmina's apply": lambda peers: peers.kasmina.apply(command(COMMAND_SEED), SystemStatePacket()),
    "kasmina's confirm": lambda peers: peers.kasmina_rollback.confirm(ORDER),
    "kasmina's abort": lambda peers: peers.kasmina_rollback.abort(ORDER),
}
NOT_REPEATABLE = {"tamiyo's step", "kasmina's apply"}
"""Calls that are not retried."""


@pytest.mark.parametrize("asked", ASKING)
async def test_responses_that_do_not_decode_are_protocol_errors_and_open_the_breaker(asked: str) -> None:
    """Each one counts as a failure and emits an event."""
    peer = asked.partition("'")[0]
    async with invalid_responses() as target:
        clients = Clients(target, policy=BreakerPolicy(failures_max=2))
        async with clients.connected() as peers:
            for _ in range(2):
                with pytest.raises(PeerProtocolError, match="answered with bytes"):
                    await ASKING[asked](peers)
    assert clients.breakers[peer].state == CIRCUIT_STATE_OPEN
    assert clients.events.count(f"tolaria.{peer}_error") == 2


@pytest.mark.parametrize("asked", ASKING)
async def test_only_repeatable_calls_are_retried(asked: str) -> None:
    """A peer that is unavailable once answers the retry, if there is one; a retry is counted, not a failure."""
    fakes = (FakeTamiyo(no_command), FakeKasmina(), FakeParticipant())
    for fake in fakes:
        fake.failures = [grpc.StatusCode.UNAVAILABLE]
    peer = asked.partition("'")[0]
    async with serving(*fakes) as target:
        clients = Clients(target, policy=BreakerPolicy(failures_max=1))
        async with clients.connected() as peers:
            if asked in NOT_REPEATABLE:
                with pytest.raises(PeerUnavailableError, match="UNAVAILABLE: as scripted"):
                    await ASKING[asked](peers)
            else:
                await ASKING[asked](peers)
    once = asked in NOT_REPEATABLE
    assert sum(fake.begun for fake in fakes) == (1 if once else 2)
    assert sum(clients.retries(peer).values()) == (0 if once else 1)
    assert clients.breakers[peer].state == (CIRCUIT_STATE_OPEN if once else CIRCUIT_STATE_CLOSED)
    assert clients.events == ([f"tolaria.{peer}_error"] if once else [])


async def test_retries_are_a_setting() -> None:
    """With `retries=0` no call is retried."""
    tamiyo = FakeTamiyo(no_command)
    tamiyo.failures = [grpc.StatusCode.UNAVAILABLE]
    async with serving(tamiyo) as target, Clients(target, retries=0).connected() as peers:
        with pytest.raises(PeerUnavailableError):
            await peers.tamiyo.evaluate_epoch(SystemStatePacket())
    assert tamiyo.begun == 1


WITH_DEADLINE = {
    "EvaluateEpoch": "tamiyo",
    "EvaluateStep": "tamiyo's step",
    "ExportSeedStates": "kasmina",
    "ApplyCommand": "kasmina's apply",
}


@pytest.mark.parametrize(("method", "asked"), WITH_DEADLINE.items())
async def test_each_method_can_have_a_deadline(method: str, asked: str) -> None:
    """Only the configured method has the shorter deadline."""

    async def never() -> None:
        await anyio.sleep_forever()

    async def never_answer(_state: SystemStatePacket) -> AdaptationCommand | None:
        await anyio.sleep_forever()
        raise AssertionError("unreachable")

    async with serving(FakeTamiyo(never_answer), FakeKasmina(before_answer=never)) as target:
        clients = Clients(target, timeout_s=0.2, timeouts_s={method: 0.05})
        async with clients.connected() as peers:
            for name, other in WITH_DEADLINE.items():
                expected = 50 if name == method else 200
                with pytest.raises(PeerTimeoutError, match=f"{name} did not answer within {expected} ms"):
                    await ASKING[other](peers)


async def test_a_call_beyond_the_limit_is_refused() -> None:
    """The settings limit the calls in flight and waiting; a refusal emits an event and is not a timeout."""
    begun, end = anyio.Event(), anyio.Event()

    async def before_answer() -> None:
        begun.set()
        await end.wait()

    async with serving(FakeKasmina(before_answer=before_answer)) as target:
        clients = Clients(target, in_flight_max=1, waiting_max=0)
        async with clients.connected() as peers, anyio.create_task_group() as tasks:
            tasks.start_soon(peers.kasmina.export_seeds, SystemStatePacket())
            await begun.wait()
            with pytest.raises(CallRefusedError):
                await peers.kasmina_rollback.prepare(ORDER)  # the limit applies to all clients of the peer
            assert clients.value("tolaria.timeout.kasmina_last_ms") == 0
            end.set()
    (event,) = clients.emitter.events
    assert event.name == "tolaria.kasmina_error"
    assert "1 calls are in flight" in event.attributes["detail"]
    assert clients.value("tolaria.timeout.kasmina_total") == 0
    assert clients.breakers["kasmina"].state == CIRCUIT_STATE_CLOSED


async def test_calls_in_flight_complete_before_the_channel_closes() -> None:
    """A response within the drain time is received."""
    begun, end = anyio.Event(), anyio.Event()
    received: list[list[SeedState]] = []

    async def before_answer() -> None:
        begun.set()
        await end.wait()

    async def ask(peers: Peers) -> None:
        received.append(await peers.kasmina.export_seeds(SystemStatePacket()))

    kasmina = FakeKasmina([SeedState(seed_id="a", stage=SEED_STAGE_TRAINING)], before_answer)
    async with serving(FakeTamiyo(no_command), kasmina) as target:
        clients = Clients(target, drain_s=10.0)
        async with anyio.create_task_group() as tasks, clients.connected() as peers:
            tasks.start_soon(ask, peers)
            await begun.wait()
            tasks.start_soon(_set_when_closing, peers, end)
    assert [seed.seed_id for seeds in received for seed in seeds] == ["a"]


async def _set_when_closing(peers: Peers, end: anyio.Event) -> None:
    """Lets the peer answer once new calls are refused, which means that the drain has begun."""
    while True:
        try:
            await peers.tamiyo.evaluate_epoch(SystemStatePacket())
        except CallRefusedError:
            end.set()
            return


async def test_a_call_that_outlasts_the_drain_is_cancelled() -> None:
    """The call of a peer that hangs is cancelled on both sides."""
    begun = anyio.Event()

    async def before_answer() -> None:
        begun.set()
        await anyio.sleep_forever()

    kasmina = FakeKasmina(before_answer=before_answer)
    async with serving(kasmina) as target:
        clients = Clients(target, timeout_s=60.0, drain_s=0.02)

        async def ask(peers: Peers) -> None:
            with pytest.raises(PeerUnavailableError, match="cancelled by the channel"):
                await peers.kasmina.export_seeds(SystemStatePacket())

        with anyio.fail_after(180):
            async with anyio.create_task_group() as tasks, clients.connected() as peers:
                tasks.start_soon(ask, peers)
                await begun.wait()
            while kasmina.running:
                await anyio.sleep(0.005)
    assert kasmina.cancelled == 1
