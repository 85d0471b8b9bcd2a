"""The one adapter for outbound calls: a deadline that reaches the server, a breaker, and an outcome for each call.

Owns the translation of gRPC's errors into `PeerError`s. Must not know what the calls mean.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import anyio.lowlevel
import grpc
import grpc.aio
from google.protobuf.message import Message

from tolaria.errors import BreakerOpenError, PeerError, PeerProtocolError, PeerTimeoutError, PeerUnavailableError
from tolaria.resilience.breaker import Breaker

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

Outcome = Literal["ok", "timeout", "error", "skipped", "abandoned"]


@dataclass(frozen=True, slots=True)
class CallRecord:
    """How one call ended. `skipped`: the breaker was open. `abandoned`: the caller was cancelled."""

    peer: str
    method: str
    outcome: Outcome
    duration_s: float
    detail: str = ""


class DeadlineCaller:
    """Makes unary calls to one peer, each bounded in time, each recorded with `observe`."""

    def __init__(
        self,
        peer: str,
        breaker: Breaker,
        *,
        observe: Callable[[CallRecord], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.peer = peer
        self._breaker = breaker
        self._observe = observe
        self._clock = clock

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        name: str,
        timeout_s: float,
    ) -> Response:
        """Call `method` and answer within `timeout_s`; the server sees the same deadline and is cancelled at it.

        Raises:
            BreakerOpenError: without calling.
            PeerTimeoutError: when the deadline passed.
            PeerProtocolError: when the answer's bytes are no such message.
            PeerUnavailableError: for every other status but OK.
        """
        if not self._breaker.allows():
            self._observe(CallRecord(self.peer, name, "skipped", 0.0))
            raise BreakerOpenError(self.peer, f"{name} skipped: the circuit breaker is open")
        started = self._clock()
        outcome: Outcome = "abandoned"
        detail = ""
        try:
            response = await _bounded(self.peer, name, method(request, timeout=timeout_s), timeout_s)
        except PeerError as error:
            outcome = "timeout" if isinstance(error, PeerTimeoutError) else "error"
            detail = error.detail
            self._breaker.failed()
            raise
        else:
            outcome = "ok"
            self._breaker.succeeded()
            return response
        finally:
            if outcome == "abandoned":
                self._breaker.abandoned()
            self._observe(CallRecord(self.peer, name, outcome, self._clock() - started, detail))


async def _bounded(
    peer: str, name: str, call: grpc.aio.UnaryUnaryCall[Request, Response], timeout_s: float
) -> Response:
    """Await `call`. The gRPC deadline cancels the server; the local one holds even if the library is late."""
    try:
        async with asyncio.timeout(timeout_s):
            response = cast("Response | None", await call)
    except TimeoutError:
        raise PeerTimeoutError(peer, f"{name} did not answer within {timeout_s * 1000:.0f} ms") from None
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise PeerTimeoutError(peer, f"{name} did not answer within {timeout_s * 1000:.0f} ms") from None
        raise PeerUnavailableError(peer, f"{name} failed: {error.code().name}: {error.details()}") from None
    except asyncio.CancelledError:
        # gRPC raises a CancelledError of its own making, in which anyio would not know its scope's again.
        await anyio.lowlevel.checkpoint()
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise PeerUnavailableError(peer, f"{name} was cancelled by the channel") from None
    if response is None:  # gRPC logs bytes that it cannot decode, and gives None for an answer
        raise PeerProtocolError(peer, f"{name} answered with bytes that are no {name} response")
    return response
