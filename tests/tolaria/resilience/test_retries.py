from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, cast

import anyio
import grpc
import grpc.aio
import pytest

from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN
from leyline.v1.tamiyo_service_pb2 import EvaluateEpochRequest, EvaluateEpochResponse
from tolaria.errors import BreakerOpenError, CallRefusedError, PeerError, PeerTimeoutError, PeerUnavailableError
from tolaria.resilience.breaker import Breaker, BreakerPolicy
from tolaria.resilience.deadline import CallLimits, CallRecord, DeadlineCaller

pytestmark = pytest.mark.anyio

AWAY = grpc.StatusCode.UNAVAILABLE


async def at_once() -> None:
    """Nothing to wait for."""


class Line:
    """A caller to a method that ends with the statuses of a script and then answers; each ask takes `ask_s`."""

    def __init__(self, *script: grpc.StatusCode, limits: CallLimits | None = None, ask_s: float = 0.0) -> None:
        self.script, self.ask_s = list(script), ask_s
        self.timeouts_s: list[float] = []
        self.hold: Callable[[], Awaitable[None]] = at_once
        self.now_s = 100.0
        self.records: list[CallRecord] = []
        self.breaker = Breaker("tamiyo", clock=lambda: self.now_s, policy=BreakerPolicy(failures_max=2))
        self.caller = DeadlineCaller(
            "tamiyo", self.breaker, observe=self.records.append, limits=limits, clock=lambda: self.now_s
        )

    async def _method(self, _request: object, *, timeout: float) -> EvaluateEpochResponse:  # noqa: ASYNC109 - gRPC's word
        self.timeouts_s.append(round(timeout, 6))
        await self.hold()
        self.now_s += self.ask_s
        if self.script:
            raise grpc.aio.AioRpcError(self.script.pop(0), grpc.aio.Metadata(), grpc.aio.Metadata(), "gone")
        return EvaluateEpochResponse()

    async def call(self, *, timeout_s: float = 5.0, repeatable: bool = True) -> EvaluateEpochResponse:
        return await self.caller.call(
            cast("Any", self._method),
            EvaluateEpochRequest(),
            name="EvaluateEpoch",
            timeout_s=timeout_s,
            repeatable=repeatable,
        )

    @property
    def outcomes(self) -> list[tuple[str, int]]:
        return [(record.outcome, record.retries) for record in self.records]


async def test_a_peer_that_is_back_answers_the_second_time() -> None:
    """One record, good, which tells of the retry; the breaker has seen no failure."""
    line = Line(AWAY)
    await line.call()
    assert line.outcomes == [("ok", 1)]
    line.script = [AWAY, AWAY]
    with pytest.raises(PeerUnavailableError):
        await line.call()
    assert line.breaker.state == CIRCUIT_STATE_CLOSED


async def test_a_call_that_must_not_be_heard_twice_is_made_once() -> None:
    """Whoever does not say that it may be repeated is not repeated."""
    line = Line(AWAY)
    with pytest.raises(PeerUnavailableError, match=r"EvaluateEpoch failed: UNAVAILABLE: gone$"):
        await line.call(repeatable=False)
    assert len(line.timeouts_s) == 1
    assert line.outcomes == [("error", 0)]


async def test_retries_are_bounded_and_the_breaker_counts_calls_not_attempts() -> None:
    """Three retries are three, told in the error, and one failure; two such calls open a breaker that takes two."""
    line = Line(*[AWAY] * 100, limits=CallLimits(retries_max=3))
    for _ in range(2):
        assert line.breaker.state == CIRCUIT_STATE_CLOSED
        with pytest.raises(PeerUnavailableError, match=r"asked 4 times"):
            await line.call()
    assert line.breaker.state == CIRCUIT_STATE_OPEN
    assert len(line.timeouts_s) == 8
    assert line.outcomes == [("error", 3), ("error", 3)]


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code not in {AWAY, grpc.StatusCode.OK}])
async def test_an_answer_that_stays_is_not_asked_for_again(code: grpc.StatusCode) -> None:
    """Every status but UNAVAILABLE, the deadline's own among them, ends the call."""
    line = Line(code, limits=CallLimits(retries_max=5))
    with pytest.raises(PeerError) as caught:
        await line.call()
    assert isinstance(caught.value, PeerTimeoutError) == (code is grpc.StatusCode.DEADLINE_EXCEEDED)
    assert len(line.timeouts_s) == 1


async def test_a_silent_peer_is_not_asked_again() -> None:
    """After the local deadline, too, there is no second attempt."""
    line = Line(limits=CallLimits(retries_max=5))
    line.hold = anyio.sleep_forever
    with pytest.raises(PeerTimeoutError, match="within 10 ms"):
        await line.call(timeout_s=0.01)
    assert len(line.timeouts_s) == 1
    assert line.outcomes == [("timeout", 0)]


async def test_retries_stay_within_the_deadline_of_the_call() -> None:
    """Each attempt gets what is left, and none begins where a pause would outlast it."""
    line = Line(*[AWAY] * 100, limits=CallLimits(retries_max=10), ask_s=0.2)
    with pytest.raises(PeerUnavailableError, match="asked 3 times"):
        await line.call(timeout_s=0.5)
    assert line.timeouts_s == [0.5, 0.3, 0.1]


async def test_waiting_for_a_place_counts_against_the_deadline() -> None:
    """A call that waited has only the rest for its peer."""
    line = Line(limits=CallLimits(in_flight_max=1), ask_s=0.3)
    begun, end = anyio.Event(), anyio.Event()

    async def hold() -> None:
        begun.set()
        await end.wait()

    line.hold = hold
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(line.call)
        await begun.wait()
        tasks.start_soon(line.call)
        await anyio.lowlevel.checkpoint()
        assert line.caller.in_flight == 1
        end.set()
    assert line.timeouts_s == [5.0, 4.7]
    assert line.caller.in_flight == 0


async def test_a_call_without_a_place_is_refused_and_no_fault_of_the_peer() -> None:
    """It is recorded as refused; the breaker learns nothing of it."""
    line = Line(limits=CallLimits(in_flight_max=1, waiting_max=0))
    begun = anyio.Event()

    async def hold() -> None:
        begun.set()
        await anyio.sleep_forever()

    line.hold = hold
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(line.call)
        await begun.wait()
        for _ in range(3):
            with pytest.raises(CallRefusedError):
                await line.call()
        tasks.cancel_scope.cancel()
    assert line.outcomes == [("refused", 0)] * 3 + [("abandoned", 0)]
    assert line.breaker.state == CIRCUIT_STATE_CLOSED


async def test_an_open_breaker_is_not_waited_for() -> None:
    """Where all places are taken, a call that the breaker would skip anyway is skipped at once."""
    line = Line(limits=CallLimits(in_flight_max=1))
    begun = anyio.Event()

    async def hold() -> None:
        begun.set()
        await anyio.sleep_forever()

    line.hold = hold
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(line.call)
        await begun.wait()
        line.breaker.force(CIRCUIT_STATE_OPEN)
        with anyio.fail_after(2), pytest.raises(BreakerOpenError, match="EvaluateEpoch skipped"):
            await line.call()
        tasks.cancel_scope.cancel()


async def test_a_trial_that_never_got_a_place_leaves_the_trial_to_the_next() -> None:
    """A half-open breaker lets one call through; one that was refused has not used that up."""
    line = Line(limits=CallLimits(in_flight_max=1, waiting_max=0))
    line.breaker.force(CIRCUIT_STATE_OPEN)
    line.now_s += 60
    async with line.caller._gate.place("another", 1.0):
        with pytest.raises(CallRefusedError):
            await line.call()
    await line.call()
    assert line.breaker.state == CIRCUIT_STATE_CLOSED
