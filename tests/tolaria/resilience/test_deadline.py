from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, cast

import anyio
import grpc.aio
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.tamiyo_service_pb2 import EvaluateEpochRequest, EvaluateEpochResponse
from leyline.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from support.peers import FakeTamiyo, command, serving
from tolaria.errors import BreakerOpenError, PeerProtocolError, PeerTimeoutError, PeerUnavailableError
from tolaria.resilience.breaker import Breaker, BreakerPolicy
from tolaria.resilience.deadline import CallRecord, DeadlineCaller

pytestmark = pytest.mark.anyio
PATIENT = BreakerPolicy(failures_max=10**9)


class Peer:
    """One fake Tamiyo and a caller to it; `hang` decides whether it ever answers."""

    def __init__(self, target: str, tamiyo: FakeTamiyo, policy: BreakerPolicy) -> None:
        self.tamiyo = tamiyo
        self.records: list[CallRecord] = []
        self.breaker = Breaker("tamiyo", clock=time.monotonic, policy=policy)
        self.channel = grpc.aio.insecure_channel(target)
        self.stub = TamiyoServiceStub(self.channel)
        self.caller = DeadlineCaller("tamiyo", self.breaker, observe=self.records.append)

    async def call(self, timeout_s: float) -> EvaluateEpochResponse:
        return await self.caller.call(
            self.stub.EvaluateEpoch, EvaluateEpochRequest(), name="EvaluateEpoch", timeout_s=timeout_s
        )


async def answer_at_once(_state: SystemStatePacket) -> AdaptationCommand | None:
    """A peer that is quick."""
    return command()


async def never_answer(_state: SystemStatePacket) -> AdaptationCommand | None:
    """A peer that hangs."""
    await anyio.sleep_forever()
    raise AssertionError("forever has ended")


@pytest.fixture
async def hanging() -> AsyncIterator[Peer]:
    """A peer that never answers, behind a breaker that never opens."""
    tamiyo = FakeTamiyo(never_answer)
    async with serving(tamiyo) as target:
        peer = Peer(target, tamiyo, PATIENT)
        yield peer
        await peer.channel.close()


async def test_an_answer_in_time_comes_back_and_is_recorded() -> None:
    """A good call returns its response, closes nothing, and leaves one record."""
    tamiyo = FakeTamiyo(answer_at_once)
    async with serving(tamiyo) as target:
        peer = Peer(target, tamiyo, PATIENT)
        response = await peer.call(2.0)
        await peer.channel.close()
    assert response.command.version == 1
    assert [(r.outcome, r.method) for r in peer.records] == [("ok", "EvaluateEpoch")]


async def test_a_timeout_cancels_the_handler_on_the_other_side(hanging: Peer) -> None:
    """The deadline reaches the server: its handler is cancelled, not left to run."""
    with pytest.raises(PeerTimeoutError, match="EvaluateEpoch did not answer within 50 ms"):
        await hanging.call(0.05)
    with anyio.fail_after(5):
        while hanging.tamiyo.running:
            await anyio.sleep(0.005)
    assert hanging.tamiyo.cancelled == 1
    assert [r.outcome for r in hanging.records] == ["timeout"]


async def test_a_cancelled_scope_around_a_call_ends_as_its_own(hanging: Peer) -> None:
    """The scope catches its own cancellation: nothing leaks out of it, and the breaker learns nothing."""
    for _ in range(20):
        with anyio.move_on_after(0.01) as scope:
            await hanging.call(5.0)
        assert scope.cancelled_caught
    assert {r.outcome for r in hanging.records} == {"abandoned"}
    assert hanging.breaker.state == CIRCUIT_STATE_CLOSED


async def test_a_channel_closed_under_a_call_is_an_unavailable_peer(hanging: Peer) -> None:
    """A CancelledError of gRPC's own, which nobody asked for, does not escape as one."""
    async with anyio.create_task_group() as tasks:

        async def call() -> None:
            with pytest.raises(PeerUnavailableError):
                await hanging.call(5.0)

        tasks.start_soon(call)
        while not hanging.tamiyo.running:
            await anyio.sleep(0.005)
        await hanging.channel.close()


async def test_a_dead_peer_is_told_apart_and_opens_the_breaker() -> None:
    """A port without a listener answers UNAVAILABLE at once; after three the peer is not called any more."""
    peer = Peer("127.0.0.1:1", FakeTamiyo(answer_at_once), BreakerPolicy())
    for _ in range(3):
        with pytest.raises(PeerUnavailableError, match="UNAVAILABLE"):
            await peer.call(2.0)
    assert peer.breaker.state == CIRCUIT_STATE_OPEN
    with pytest.raises(BreakerOpenError):
        await peer.call(2.0)
    await peer.channel.close()
    assert [r.outcome for r in peer.records] == ["error", "error", "error", "skipped"]


async def test_an_error_status_carries_its_words() -> None:
    """What the peer says about its failure is in the error's detail."""

    async def fail(_state: SystemStatePacket) -> AdaptationCommand | None:
        raise ValueError("no policy loaded")

    async with serving(FakeTamiyo(fail)) as target:
        peer = Peer(target, FakeTamiyo(fail), PATIENT)
        with pytest.raises(PeerUnavailableError, match="no policy loaded"):
            await peer.call(2.0)
        await peer.channel.close()


async def test_an_answer_that_cannot_be_decoded_is_a_failure() -> None:
    """Bytes that gRPC cannot decode, for which it gives None, are an error in the record and to the breaker."""

    async def undecodable(_request: EvaluateEpochRequest, *, timeout: float) -> None:  # noqa: ASYNC109 - gRPC's word
        """What a method of gRPC's does with such bytes."""

    records: list[CallRecord] = []
    breaker = Breaker("tamiyo", clock=time.monotonic, policy=BreakerPolicy(failures_max=1))
    caller = DeadlineCaller("tamiyo", breaker, observe=records.append)
    with pytest.raises(PeerProtocolError, match="EvaluateEpoch answered with bytes that are no"):
        await caller.call(cast("Any", undecodable), EvaluateEpochRequest(), name="EvaluateEpoch", timeout_s=2.0)
    assert [r.outcome for r in records] == ["error"]
    assert breaker.state == CIRCUIT_STATE_OPEN
