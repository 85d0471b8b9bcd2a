"""The one adapter for outbound calls: a deadline that reaches the server, a breaker, and an outcome for each call.

Owns the translation of gRPC's errors into `PeerError`s, and when a call is made again. Must not know what the calls
mean: whoever calls says whether the peer may hear a request twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, cast

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
from google.protobuf.message import Message

from leyline.v1.enums_pb2 import CIRCUIT_STATE_OPEN
from tolaria.errors import (
    BreakerOpenError,
    CallRefusedError,
    PeerError,
    PeerProtocolError,
    PeerTimeoutError,
    PeerUnavailableError,
)
from tolaria.resilience.breaker import Breaker
from tolaria.resilience.gate import CallGate

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

Outcome = Literal["ok", "timeout", "error", "skipped", "refused", "abandoned"]

FIRST_PAUSE_S = 0.02
"""Before a call is made again; doubled each time. Two peers at most are called, so nothing has to be spread out."""

# The connection was refused, lost or closed under the call. Any other status is an answer, and stays the same.
_AWAY = grpc.StatusCode.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class CallRecord:
    """How one call ended, however often it was made: `retries` counts the times after the first.

    `skipped`: the breaker was open. `refused`: there was no place for it. `abandoned`: the caller was cancelled.
    """

    peer: str
    method: str
    outcome: Outcome
    duration_s: float
    detail: str = ""
    retries: int = 0


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Bounds of all calls to one peer: in flight, waiting for that, and retries of a call that may be repeated."""

    in_flight_max: int = 8
    waiting_max: int = 32
    retries_max: int = 1


class DeadlineCaller:
    """Makes unary calls to one peer, each bounded in time, each recorded with `observe`. Event loop only."""

    def __init__(
        self,
        peer: str,
        breaker: Breaker,
        *,
        observe: Callable[[CallRecord], None],
        limits: CallLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = limits or CallLimits()
        self.peer = peer
        self._breaker = breaker
        self._observe = observe
        self._retries_max = limits.retries_max
        self._gate = CallGate(peer, in_flight_max=limits.in_flight_max, waiting_max=limits.waiting_max)
        self._clock = clock

    @property
    def in_flight(self) -> int:
        """Calls that wait for the peer now."""
        return self._gate.in_flight

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        name: str,
        timeout_s: float,
        repeatable: bool = False,
    ) -> Response:
        """Call `method` and answer within `timeout_s`; the server sees the same deadline and is cancelled at it.

        Waiting for a place, retries and pauses between them are all within `timeout_s`. The breaker learns one outcome.

        Args:
            method: of a stub.
            request: its argument.
            name: for records and errors.
            timeout_s: of the whole.
            repeatable: hearing the request twice is to the peer as hearing it once. Such a call is made again when the
                peer was away; none is made again after a timeout.

        Raises:
            BreakerOpenError: without calling.
            CallRefusedError: without calling, when too many calls are in flight, or after `drain`.
            PeerTimeoutError: when the deadline passed.
            PeerProtocolError: when the answer's bytes are no such message.
            PeerUnavailableError: for every other status but OK.
        """
        started_s = self._clock()
        retries_max = self._retries_max if repeatable else 0
        question = _Question(method, request, name, timeout_s, started_s + timeout_s, retries_max)
        outcome: Outcome = "abandoned"
        detail = ""
        try:
            if self._breaker.state == CIRCUIT_STATE_OPEN:  # not worth a place, nor waiting for one
                raise self._skipped(name)
            async with self._gate.place(name, timeout_s):
                response = await self._judged(question)
        except PeerError as error:
            outcome, detail = _outcome_of(error), error.detail
            raise
        else:
            outcome = "ok"
            return response
        finally:
            duration_s = self._clock() - started_s
            self._observe(CallRecord(self.peer, name, outcome, duration_s, detail, question.retries))

    async def drain(self, timeout_s: float) -> None:
        """Refuse all further calls, and wait for those in flight, at most `timeout_s`."""
        await self._gate.drain(timeout_s)

    async def _judged(self, question: _Question[Request, Response]) -> Response:
        """Ask, if the breaker lets it, and tell it what came of that."""
        if not self._breaker.allows():
            raise self._skipped(question.name)
        tell = self._breaker.abandoned
        try:
            response = await self._asked(question)
        except PeerError:
            tell = self._breaker.failed
            raise
        else:
            tell = self._breaker.succeeded
            return response
        finally:
            tell()

    async def _asked(self, question: _Question[Request, Response]) -> Response:
        """Ask until there is an answer, an error that stays, or nothing left of retries or time."""
        pause_s = FIRST_PAUSE_S
        while True:
            left_s = max(0.0, question.deadline_s - self._clock())
            try:
                return await self._answer(question, left_s)
            except grpc.aio.AioRpcError as error:
                spent = question.retries == question.retries_max
                if error.code() is not _AWAY or spent or self._clock() + pause_s >= question.deadline_s:
                    raise self._failure(question, error) from None
            await anyio.sleep(pause_s)
            question.retries += 1
            pause_s *= 2

    async def _answer(self, question: _Question[Request, Response], left_s: float) -> Response:
        """Ask once. The gRPC deadline cancels the server; the local one holds even if the library is late."""
        try:
            async with asyncio.timeout(left_s):
                response = cast("Response | None", await question.method(question.request, timeout=left_s))
        except TimeoutError:
            raise self._timed_out(question) from None
        except asyncio.CancelledError:
            # gRPC raises a CancelledError of its own making, in which anyio would not know its scope's again.
            await anyio.lowlevel.checkpoint()
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise PeerUnavailableError(self.peer, f"{question.name} was cancelled by the channel") from None
        if response is None:  # gRPC logs bytes that it cannot decode, and gives None for an answer
            raise PeerProtocolError(self.peer, f"{question.name} answered with bytes that are no message of its kind")
        return response

    def _failure(self, question: _Question[Request, Response], error: grpc.aio.AioRpcError) -> PeerError:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return self._timed_out(question)
        tries = f" (asked {question.retries + 1} times)" if question.retries else ""
        detail = f"{question.name} failed: {error.code().name}: {error.details()}{tries}"
        return PeerUnavailableError(self.peer, detail)

    def _timed_out(self, question: _Question[Request, Response]) -> PeerTimeoutError:
        return PeerTimeoutError(self.peer, f"{question.name} did not answer within {question.timeout_s * 1000:.0f} ms")

    def _skipped(self, name: str) -> BreakerOpenError:
        return BreakerOpenError(self.peer, f"{name} skipped: the circuit breaker is open")


@dataclass(slots=True)
class _Question(Generic[Request, Response]):
    """One call: what is asked, until when (on the caller's clock), and how often it has been asked again."""

    method: grpc.aio.UnaryUnaryMultiCallable[Request, Response]
    request: Request
    name: str
    timeout_s: float
    deadline_s: float
    retries_max: int
    retries: int = 0


# The first class that an error is an instance of decides.
_OUTCOMES: tuple[tuple[type[PeerError], Outcome], ...] = (
    (BreakerOpenError, "skipped"),
    (CallRefusedError, "refused"),
    (PeerTimeoutError, "timeout"),
    (PeerError, "error"),
)


def _outcome_of(error: PeerError) -> Outcome:
    return next(outcome for kind, outcome in _OUTCOMES if isinstance(error, kind))
