"""Outbound gRPC calls with a deadline, a limit on calls in flight, retries, a circuit breaker, and a record of each.

gRPC's errors are translated into `PeerError`s here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, cast

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
from google.protobuf.message import Message

from leyline.v1.enums_pb2 import CIRCUIT_STATE_OPEN
from tolaria.config import PeerSettings
from tolaria.errors import (
    BreakerOpenError,
    CallRefusedError,
    PeerError,
    PeerProtocolError,
    PeerTimeoutError,
    PeerUnavailableError,
)
from tolaria.resilience.breaker import Breaker
from tolaria.values.spans import TRACEPARENT, SpanContext, current_span

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

Outcome = Literal["ok", "timeout", "error", "skipped", "refused", "abandoned"]

FIRST_PAUSE_S = 0.02
"""Pause before the first retry, doubled for each further one. Without jitter, as there are only two peers."""


@dataclass(frozen=True, slots=True)
class CallRecord:
    """The result of one call, including its retries.

    skipped: the breaker was open. refused: too many calls were in flight. abandoned: the caller was cancelled.
    `span` is the call's own, if it belongs to a trace.
    """

    peer: str
    method: str
    outcome: Outcome
    duration_s: float
    detail: str = ""
    retries: int = 0
    span: SpanContext | None = None


class CallGate:
    """Limits the calls in flight to a peer and the calls that wait, in order, for one of them to end."""

    def __init__(self, peer: str, *, in_flight_max: int, waiting_max: int) -> None:
        self._peer = peer
        self._in_flight_max, self._waiting_max = in_flight_max, waiting_max
        self._slots = anyio.Semaphore(in_flight_max, max_value=in_flight_max, fast_acquire=True)
        self._closing = False

    @asynccontextmanager
    async def slot(self, name: str, timeout_s: float) -> AsyncIterator[None]:
        """Waits at most `timeout_s` for a slot and holds it while the context is open.

        Raises:
            CallRefusedError: too many calls wait already, no slot became free in time, or the gate is closed.
        """
        self._refuse_if_closing(name)
        await self._acquire(name, timeout_s)
        try:
            self._refuse_if_closing(name)  # the gate may have been closed during the wait
            yield
        finally:
            self._slots.release()

    async def drain(self, timeout_s: float) -> None:
        """Closes the gate, which refuses waiting calls, and waits at most `timeout_s` for calls in flight."""
        self._closing = True
        with anyio.move_on_after(timeout_s):
            for _ in range(self._in_flight_max):
                await self._slots.acquire()

    def _refuse_if_closing(self, name: str) -> None:
        if self._closing:
            raise CallRefusedError(self._peer, f"{name} refused: the channel is closing")

    async def _acquire(self, name: str, timeout_s: float) -> None:
        if self._slots.value:
            self._slots.acquire_nowait()
            return
        if self._slots.statistics().tasks_waiting >= self._waiting_max:
            detail = f"{self._in_flight_max} calls are in flight and {self._waiting_max} wait, which is the maximum"
            raise CallRefusedError(self._peer, f"{name} refused: {detail}")
        with anyio.move_on_after(timeout_s) as scope:
            await self._slots.acquire()
        if scope.cancelled_caught:
            detail = f"none of {self._in_flight_max} calls in flight ended within {timeout_s * 1000:.0f} ms"
            raise CallRefusedError(self._peer, f"{name} refused: {detail}")


@dataclass(slots=True)
class _Call(Generic[Request, Response]):
    """A call in progress; `started_s` is on the caller's clock."""

    method: grpc.aio.UnaryUnaryMultiCallable[Request, Response]
    request: Request
    name: str
    timeout_s: float
    started_s: float
    retries_max: int
    span: SpanContext | None
    retries: int = 0

    @property
    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """What the peer needs to continue the trace; None if the trace is not exported."""
        return ((TRACEPARENT, self.span.traceparent),) if self.span is not None and self.span.sampled else None


class DeadlineCaller:
    """Makes unary calls to one peer. Used on the event loop only.

    Args:
        peer: name of the peer, for errors and records.
        breaker: counts each call once, whatever its retries.
        settings: deadlines by method, and limits of calls in flight, waiting calls and retries.
        observe: called with the record of each call.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        peer: str,
        breaker: Breaker,
        settings: PeerSettings,
        *,
        observe: Callable[[CallRecord], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.peer = peer
        self._breaker = breaker
        self._observe = observe
        self.settings = settings
        self._gate = CallGate(peer, in_flight_max=settings.in_flight_max, waiting_max=settings.waiting_max)
        self._clock = clock

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        name: str,
        timeout_s: float | None = None,
        repeatable: bool = False,
    ) -> Response:
        """Calls the method `name` of a stub. The deadline also applies on the server, which cancels its handler.

        Args:
            method: of a stub.
            request: its argument.
            name: for errors and records.
            timeout_s: for the wait for a slot, all attempts and the pauses between them; None: as in the settings.
            repeatable: the call is idempotent, and is retried while the peer is unavailable, but not after a timeout.

        Raises:
            BreakerOpenError: the breaker is open; the call was not made.
            CallRefusedError: too many calls are in flight, or the caller is drained; the call was not made.
            PeerTimeoutError: the deadline passed.
            PeerProtocolError: the response cannot be decoded.
            PeerUnavailableError: the call ended with another status than OK.
        """
        timeout_s = self.settings.timeout_of(name) if timeout_s is None else timeout_s
        retries_max = self.settings.retries if repeatable else 0
        parent = current_span()
        span = None if parent is None else parent.child()
        call = _Call(method, request, name, timeout_s, self._clock(), retries_max, span)
        outcome: Outcome = "abandoned"
        detail = ""
        try:
            if self._breaker.state == CIRCUIT_STATE_OPEN:  # fail without waiting for a slot
                raise self._skipped(name)
            async with self._gate.slot(name, timeout_s):
                response = await self._call_through_breaker(call)
            outcome = "ok"
        except PeerError as error:
            outcome, detail = _outcome_of(error), error.detail
            raise
        finally:
            duration_s = self._clock() - call.started_s
            self._observe(CallRecord(self.peer, name, outcome, duration_s, detail, call.retries, span))
        return response

    async def drain(self, timeout_s: float) -> None:
        """Refuses further calls, and waits at most `timeout_s` for those in flight."""
        await self._gate.drain(timeout_s)

    async def _call_through_breaker(self, call: _Call[Request, Response]) -> Response:
        if not self._breaker.allows():
            raise self._skipped(call.name)
        record = self._breaker.abandoned
        try:
            response = await self._call_with_retries(call)
            record = self._breaker.succeeded
        except PeerError:
            record = self._breaker.failed
            raise
        finally:
            record()
        return response

    async def _call_with_retries(self, call: _Call[Request, Response]) -> Response:
        pause_s = FIRST_PAUSE_S
        deadline_s = call.started_s + call.timeout_s
        while True:
            try:
                return await self._attempt(call, max(0.0, deadline_s - self._clock()))
            except grpc.aio.AioRpcError as error:
                # UNAVAILABLE means a failed connection. Any other status is the peer's answer, and would be repeated.
                spent = call.retries == call.retries_max or self._clock() + pause_s >= deadline_s
                if spent or error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise self._translated(call, error) from None
            await anyio.sleep(pause_s)
            call.retries += 1
            pause_s *= 2

    async def _attempt(self, call: _Call[Request, Response], left_s: float) -> Response:
        """Calls once. gRPC's deadline cancels the handler; the local timeout applies even if gRPC is late."""
        try:
            async with asyncio.timeout(left_s):
                answer = await call.method(call.request, timeout=left_s, metadata=call.metadata)
                response = cast("Response | None", answer)
        except TimeoutError:
            raise self._timed_out(call) from None
        except asyncio.CancelledError:
            # gRPC raises a new CancelledError, which anyio would not attribute to its cancel scope.
            await anyio.lowlevel.checkpoint()
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise PeerUnavailableError(self.peer, f"{call.name} was cancelled by the channel") from None
        if response is None:  # gRPC logs a response that it cannot decode, and returns None
            raise PeerProtocolError(self.peer, f"{call.name} answered with bytes that are not a message of its type")
        return response

    def _translated(self, call: _Call[Request, Response], error: grpc.aio.AioRpcError) -> PeerError:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return self._timed_out(call)
        attempts = f" (asked {call.retries + 1} times)" if call.retries else ""
        return PeerUnavailableError(self.peer, f"{call.name} failed: {error.code().name}: {error.details()}{attempts}")

    def _timed_out(self, call: _Call[Request, Response]) -> PeerTimeoutError:
        return PeerTimeoutError(self.peer, f"{call.name} did not answer within {call.timeout_s * 1000:.0f} ms")

    def _skipped(self, name: str) -> BreakerOpenError:
        return BreakerOpenError(self.peer, f"{name} skipped: the circuit breaker is open")


def _outcome_of(error: PeerError) -> Outcome:
    outcomes: dict[type[PeerError], Outcome] = {
        BreakerOpenError: "skipped", CallRefusedError: "refused", PeerTimeoutError: "timeout"
    }  # fmt: skip
    return outcomes.get(type(error), "error")
