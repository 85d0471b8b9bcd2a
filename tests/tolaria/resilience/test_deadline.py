from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, cast

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest
from anyio.abc import TaskGroup

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.tamiyo_service_pb2 import EvaluateEpochRequest, EvaluateEpochResponse
from leyline.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from support.peers import FakeTamiyo, command, serving
from tolaria.config import PeerSettings
from tolaria.errors import (
    BreakerOpenError,
    CallRefusedError,
    PeerError,
    PeerProtocolError,
    PeerTimeoutError,
    PeerUnavailableError,
)
from tolaria.resilience.breaker import Breaker, BreakerPolicy
from tolaria.resilience.deadline import CallGate, CallRecord, DeadlineCaller
from tolaria.values.spans import SpanContext, within

pytestmark = pytest.mark.anyio

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
NEVER_OPENS = BreakerPolicy(failures_max=10**9)


class ServedPeer:
    """A caller to a fake Tamiyo on a real gRPC server."""

    def __init__(self, target: str, tamiyo: FakeTamiyo, policy: BreakerPolicy) -> None:
        self.tamiyo = tamiyo
        self.records: list[CallRecord] = []
        self.breaker = Breaker("tamiyo", clock=time.monotonic, policy=policy)
        self.channel = grpc.aio.insecure_channel(target)
        self.stub = TamiyoServiceStub(self.channel)
        self.caller = DeadlineCaller("tamiyo", self.breaker, PeerSettings(), observe=self.records.append)

    async def call(self, timeout_s: float) -> EvaluateEpochResponse:
        return await self.caller.call(
            self.stub.EvaluateEpoch, EvaluateEpochRequest(), name="EvaluateEpoch", timeout_s=timeout_s
        )


async def answer(_state: SystemStatePacket) -> AdaptationCommand | None:
    """The handler of a working peer."""
    return command()


async def hang(_state: SystemStatePacket) -> AdaptationCommand | None:
    """The handler of a hanging peer."""
    await anyio.sleep_forever()
    raise AssertionError("unreachable")


@pytest.fixture
async def hanging() -> AsyncIterator[ServedPeer]:
    """A hanging peer behind a breaker that never opens."""
    tamiyo = FakeTamiyo(hang)
    async with serving(tamiyo) as target:
        peer = ServedPeer(target, tamiyo, NEVER_OPENS)
        yield peer
        await peer.channel.close()


async def test_response_is_returned_and_recorded() -> None:
    """A successful call has one record."""
    tamiyo = FakeTamiyo(answer)
    async with serving(tamiyo) as target:
        peer = ServedPeer(target, tamiyo, NEVER_OPENS)
        response = await peer.call(2.0)
        await peer.channel.close()
    assert response.command.version == 1
    assert [(r.outcome, r.method) for r in peer.records] == [("ok", "EvaluateEpoch")]


async def test_timeout_cancels_the_handler_on_the_server(hanging: ServedPeer) -> None:
    """The deadline is sent to the server, which cancels its handler."""
    with pytest.raises(PeerTimeoutError, match="EvaluateEpoch did not answer within 50 ms"):
        await hanging.call(0.05)
    with anyio.fail_after(180):
        while hanging.tamiyo.running:
            await anyio.sleep(0.005)
    assert hanging.tamiyo.cancelled == 1
    assert [r.outcome for r in hanging.records] == ["timeout"]


async def test_cancel_scope_around_a_call_catches_its_cancellation(hanging: ServedPeer) -> None:
    """The call is recorded as abandoned, and the breaker does not count it."""
    for _ in range(20):
        with anyio.move_on_after(0.01) as scope:
            await hanging.call(5.0)
        assert scope.cancelled_caught
    assert {r.outcome for r in hanging.records} == {"abandoned"}
    assert hanging.breaker.state == CIRCUIT_STATE_CLOSED


async def test_closing_the_channel_makes_the_peer_unavailable(hanging: ServedPeer) -> None:
    """A CancelledError that gRPC raises by itself is translated."""
    async with anyio.create_task_group() as tasks:

        async def call() -> None:
            with pytest.raises(PeerUnavailableError):
                await hanging.call(5.0)

        tasks.start_soon(call)
        while not hanging.tamiyo.running:
            await anyio.sleep(0.005)
        await hanging.channel.close()


async def test_unreachable_peer_opens_the_breaker() -> None:
    """A port without a server fails with UNAVAILABLE; after three failures calls are skipped."""
    peer = ServedPeer("127.0.0.1:1", FakeTamiyo(answer), BreakerPolicy())
    for _ in range(3):
        with pytest.raises(PeerUnavailableError, match="UNAVAILABLE"):
            await peer.call(2.0)
    assert peer.breaker.state == CIRCUIT_STATE_OPEN
    with pytest.raises(BreakerOpenError):
        await peer.call(2.0)
    await peer.channel.close()
    assert [r.outcome for r in peer.records] == ["error", "error", "error", "skipped"]


async def test_error_has_the_details_of_the_peers_status() -> None:
    """The message of the status is in the error."""

    async def fail(_state: SystemStatePacket) -> AdaptationCommand | None:
        raise ValueError("no policy loaded")

    async with serving(FakeTamiyo(fail)) as target:
        peer = ServedPeer(target, FakeTamiyo(fail), NEVER_OPENS)
        with pytest.raises(PeerUnavailableError, match="no policy loaded"):
            await peer.call(2.0)
        await peer.channel.close()


async def test_undecodable_response_is_a_protocol_error() -> None:
    """GRPC returns None for such a response; the breaker counts a failure."""

    async def undecodable(
        _request: EvaluateEpochRequest,
        *,
        timeout: float,  # noqa: ASYNC109 - gRPC's name
        metadata: object,
    ) -> None:
        """Returns what a method of a stub returns for such a response."""

    records: list[CallRecord] = []
    breaker = Breaker("tamiyo", clock=time.monotonic, policy=BreakerPolicy(failures_max=1))
    caller = DeadlineCaller("tamiyo", breaker, PeerSettings(), observe=records.append)
    with pytest.raises(PeerProtocolError, match="EvaluateEpoch answered with bytes that are no"):
        await caller.call(cast("Any", undecodable), EvaluateEpochRequest(), name="EvaluateEpoch", timeout_s=2.0)
    assert [r.outcome for r in records] == ["error"]
    assert breaker.state == CIRCUIT_STATE_OPEN


async def return_immediately() -> None:
    """Does not wait."""


class ScriptedPeer:
    """A caller to a method that fails with the statuses of a script and then succeeds, on a manual clock.

    Each attempt waits for `wait` and advances the clock by `attempt_s`.
    """

    def __init__(self, *script: grpc.StatusCode, settings: PeerSettings | None = None, attempt_s: float = 0.0) -> None:
        self.script, self.attempt_s = list(script), attempt_s
        self.timeouts_s: list[float] = []
        self.metadata: list[object] = []
        self.wait: Callable[[], Awaitable[None]] = return_immediately
        self.now_s = 100.0
        self.records: list[CallRecord] = []
        self.breaker = Breaker("tamiyo", clock=lambda: self.now_s, policy=BreakerPolicy(failures_max=2))
        self.caller = DeadlineCaller(
            "tamiyo", self.breaker, settings or PeerSettings(), observe=self.records.append, clock=lambda: self.now_s
        )

    async def _method(
        self,
        _request: object,
        *,
        timeout: float,  # noqa: ASYNC109 - gRPC's name
        metadata: object,
    ) -> EvaluateEpochResponse:
        self.timeouts_s.append(round(timeout, 6))
        self.metadata.append(metadata)
        await self.wait()
        self.now_s += self.attempt_s
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

    def hold(self) -> tuple[anyio.Event, anyio.Event]:
        """Makes attempts wait; returns the events of an attempt's start and of its release."""
        started, release = anyio.Event(), anyio.Event()

        async def wait() -> None:
            started.set()
            await release.wait()

        self.wait = wait
        return started, release

    @property
    def outcomes(self) -> list[tuple[str, int]]:
        return [(record.outcome, record.retries) for record in self.records]


async def test_retry_succeeds_when_the_peer_is_back() -> None:
    """The call is recorded once, as successful, with its retry; the breaker counts no failure."""
    peer = ScriptedPeer(UNAVAILABLE)
    await peer.call()
    assert peer.outcomes == [("ok", 1)]
    peer.script = [UNAVAILABLE, UNAVAILABLE]
    with pytest.raises(PeerUnavailableError):
        await peer.call()
    assert peer.breaker.state == CIRCUIT_STATE_CLOSED


async def test_call_that_is_not_repeatable_is_made_once() -> None:
    """By default a call is not retried."""
    peer = ScriptedPeer(UNAVAILABLE)
    with pytest.raises(PeerUnavailableError, match=r"EvaluateEpoch failed: UNAVAILABLE: gone$"):
        await peer.call(repeatable=False)
    assert len(peer.timeouts_s) == 1
    assert peer.outcomes == [("error", 0)]


async def test_breaker_counts_calls_and_not_attempts() -> None:
    """A call with three retries is one failure."""
    peer = ScriptedPeer(*[UNAVAILABLE] * 100, settings=PeerSettings(retries=3))
    for _ in range(2):
        assert peer.breaker.state == CIRCUIT_STATE_CLOSED
        with pytest.raises(PeerUnavailableError, match=r"asked 4 times"):
            await peer.call()
    assert peer.breaker.state == CIRCUIT_STATE_OPEN
    assert len(peer.timeouts_s) == 8
    assert peer.outcomes == [("error", 3), ("error", 3)]


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code not in {UNAVAILABLE, grpc.StatusCode.OK}])
async def test_other_statuses_are_not_retried(code: grpc.StatusCode) -> None:
    """Every status but UNAVAILABLE ends the call."""
    peer = ScriptedPeer(code, settings=PeerSettings(retries=5))
    with pytest.raises(PeerError) as caught:
        await peer.call()
    assert isinstance(caught.value, PeerTimeoutError) == (code is grpc.StatusCode.DEADLINE_EXCEEDED)
    assert len(peer.timeouts_s) == 1


async def test_local_timeout_is_not_retried() -> None:
    """A call that does not return in time has used its deadline."""
    peer = ScriptedPeer(settings=PeerSettings(retries=5))
    peer.wait = anyio.sleep_forever
    with pytest.raises(PeerTimeoutError, match="within 10 ms"):
        await peer.call(timeout_s=0.01)
    assert len(peer.timeouts_s) == 1
    assert peer.outcomes == [("timeout", 0)]


async def test_retries_stay_within_the_deadline() -> None:
    """Each attempt has the remaining time, and none begins when the pause before it would exceed the deadline."""
    peer = ScriptedPeer(*[UNAVAILABLE] * 100, settings=PeerSettings(retries=10), attempt_s=0.2)
    with pytest.raises(PeerUnavailableError, match="asked 3 times"):
        await peer.call(timeout_s=0.5)
    assert peer.timeouts_s == [0.5, 0.3, 0.1]


async def test_wait_for_a_slot_counts_against_the_deadline() -> None:
    """A call that waited has the remaining time."""
    peer = ScriptedPeer(settings=PeerSettings(in_flight_max=1), attempt_s=0.3)
    started, release = peer.hold()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(peer.call)
        await started.wait()
        tasks.start_soon(peer.call)
        await anyio.lowlevel.checkpoint()
        assert len(peer.timeouts_s) == 1
        release.set()
    assert peer.timeouts_s == [5.0, 4.7]


async def test_refused_call_does_not_count_for_the_breaker() -> None:
    """A call without a slot is recorded as refused."""
    peer = ScriptedPeer(settings=PeerSettings(in_flight_max=1, waiting_max=0))
    started, _release = peer.hold()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(peer.call)
        await started.wait()
        for _ in range(3):
            with pytest.raises(CallRefusedError):
                await peer.call()
        tasks.cancel_scope.cancel()
    assert peer.outcomes == [("refused", 0)] * 3 + [("abandoned", 0)]
    assert peer.breaker.state == CIRCUIT_STATE_CLOSED


async def test_open_breaker_skips_a_call_without_waiting_for_a_slot() -> None:
    """When all slots are taken and the breaker is open, a call fails immediately."""
    peer = ScriptedPeer(settings=PeerSettings(in_flight_max=1))
    started, _release = peer.hold()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(peer.call)
        await started.wait()
        peer.breaker.force(CIRCUIT_STATE_OPEN)
        with anyio.fail_after(180), pytest.raises(BreakerOpenError, match="EvaluateEpoch skipped"):
            await peer.call()
        tasks.cancel_scope.cancel()


async def test_refused_call_does_not_use_the_trial() -> None:
    """The one call that a half-open breaker allows is still available after a call without a slot."""
    peer = ScriptedPeer(settings=PeerSettings(in_flight_max=1, waiting_max=0))
    started, _release = peer.hold()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(peer.call)
        await started.wait()
        peer.breaker.force(CIRCUIT_STATE_OPEN)
        peer.now_s += 60
        with pytest.raises(CallRefusedError):
            await peer.call()
        assert peer.breaker.allows()
        assert not peer.breaker.allows()
        tasks.cancel_scope.cancel()


class Holder:
    """A task that waits for a slot of a gate and holds it until `end`."""

    def __init__(self, gate: CallGate, tasks: TaskGroup, timeout_s: float = 10.0) -> None:
        self.inside, self.over = anyio.Event(), anyio.Event()
        self.refused = ""
        self._release = anyio.Event()
        self._gate, self._timeout_s = gate, timeout_s
        tasks.start_soon(self._hold)

    async def _hold(self) -> None:
        try:
            async with self._gate.slot("Ask", self._timeout_s):
                self.inside.set()
                await self._release.wait()
        except CallRefusedError as error:
            self.refused = error.detail
        self.over.set()

    async def end(self) -> None:
        """Releases the slot."""
        self._release.set()
        await self.over.wait()


async def settle() -> None:
    """Lets every task run until it waits."""
    for _ in range(10):
        await anyio.lowlevel.checkpoint()


async def test_gate_limits_the_calls_in_flight() -> None:
    """Further calls wait and get free slots in order."""
    gate = CallGate("tamiyo", in_flight_max=2, waiting_max=8)
    async with anyio.create_task_group() as tasks:
        holders = [Holder(gate, tasks) for _ in range(4)]
        await settle()
        assert [h.inside.is_set() for h in holders] == [True, True, False, False]
        await holders[1].end()
        await settle()
        assert [h.inside.is_set() for h in holders] == [True, True, True, False]
        for holder in (holders[0], holders[2], holders[3]):
            await holder.end()


async def test_gate_limits_the_waiting_calls() -> None:
    """One call more is refused immediately, with the limits in the message."""
    gate = CallGate("tamiyo", in_flight_max=1, waiting_max=1)
    async with anyio.create_task_group() as tasks:
        first, second = Holder(gate, tasks), Holder(gate, tasks)
        await settle()
        with pytest.raises(CallRefusedError, match="tamiyo: Ask refused: 1 calls are in flight and 1 wait"):
            async with gate.slot("Ask", 10.0):
                raise AssertionError("unreachable")
        await first.end()
        await second.end()


async def test_timeout_ends_the_wait_for_a_slot() -> None:
    """The call is refused and leaves the queue."""
    gate = CallGate("tamiyo", in_flight_max=1, waiting_max=1)
    async with anyio.create_task_group() as tasks:
        first = Holder(gate, tasks)
        await settle()
        late = Holder(gate, tasks, timeout_s=0.01)
        await late.over.wait()
        assert late.refused == "Ask refused: none of 1 calls in flight ended within 10 ms"
        await first.end()
        async with gate.slot("Ask", 0.0):
            pass


async def test_cancelled_waiter_leaves_the_queue() -> None:
    """The next waiter gets the slot."""
    gate = CallGate("tamiyo", in_flight_max=1, waiting_max=2)
    async with anyio.create_task_group() as tasks:
        first = Holder(gate, tasks)
        await settle()
        async with anyio.create_task_group() as cancelled:
            Holder(gate, cancelled)
            await settle()
            cancelled.cancel_scope.cancel()
        last = Holder(gate, tasks)
        await first.end()
        await settle()
        assert last.inside.is_set()
        await last.end()


async def test_drain_waits_for_calls_in_flight_and_refuses_others() -> None:
    """Calls that wait and new calls are refused."""
    gate = CallGate("tamiyo", in_flight_max=1, waiting_max=8)
    drained = anyio.Event()

    async def drain() -> None:
        await gate.drain(10.0)
        drained.set()

    with anyio.fail_after(180):
        async with anyio.create_task_group() as tasks:
            first, waiting = Holder(gate, tasks), Holder(gate, tasks)
            await settle()
            tasks.start_soon(drain)
            await settle()
            assert not drained.is_set()
            with pytest.raises(CallRefusedError, match="the channel is closing"):
                async with gate.slot("Ask", 10.0):
                    raise AssertionError("unreachable")
            await first.end()
            await drained.wait()
            await waiting.over.wait()
            assert waiting.refused == "Ask refused: the channel is closing"


async def test_drain_ends_at_its_timeout() -> None:
    """A call that does not end delays it no longer."""
    gate = CallGate("tamiyo", in_flight_max=1, waiting_max=0)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(gate.slot("Ask", 1.0))
        with anyio.fail_after(180):
            await gate.drain(0.01)


@pytest.mark.parametrize("sampled", [True, False])
async def test_a_call_continues_the_trace_that_it_belongs_to(sampled: bool) -> None:
    """The peer gets the header if the trace is exported; the record has the call's own span in any case."""
    peer, parent = ScriptedPeer(UNAVAILABLE), SpanContext("a" * 32, "b" * 16, sampled=sampled)
    with within(parent):
        await peer.call()
    span = peer.records[0].span
    assert span is not None
    assert (span.trace_id, span.parent_id) == (parent.trace_id, parent.span_id)
    assert peer.metadata == [(("traceparent", span.traceparent),) if sampled else None] * 2  # with the retry


async def test_a_call_outside_of_a_trace_has_no_span() -> None:
    """No trace begins with it."""
    peer = ScriptedPeer()
    await peer.call()
    assert (peer.records[0].span, peer.metadata) == (None, [None])
