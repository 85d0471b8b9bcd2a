"""What every servicer of requests that change something shares: at most once, errors as statuses, a bound on waiting.

Must not know what requests do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
import grpc.aio

from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceServicer
from tolaria.errors import StillUnderwayError, TolariaError
from tolaria.rpc.requests import Answer, MutatingRequest, RequestLedger
from tolaria.rpc.status import abort

Context = grpc.aio.ServicerContext[object, object]
Result = TypeVar("Result")

# Longest that a call may wait for the lane; a microbatch that takes longer still takes effect, unanswered.
EFFECT_TIMEOUT_S = 60.0


class LedgeredService(TolariaAdminServiceServicer):
    """Base of the admin servicer."""

    def __init__(self, ledger: RequestLedger) -> None:
        self._ledger = ledger

    async def _once(
        self, method: str, request: MutatingRequest, context: Context, carry_out: Callable[[], Awaitable[Answer]]
    ) -> Answer:
        try:
            return await self._ledger.once(method, request, carry_out)
        except TolariaError as error:
            await abort(context, error)


async def bounded(
    effect: Awaitable[Result], *, timeout_s: float = EFFECT_TIMEOUT_S, missed: str = "the lane did not come to a fence"
) -> Result:
    """Wait for an effect in the lane; `missed` says what did not happen in time.

    Raises:
        StillUnderwayError: it took too long; it still takes effect.
    """
    with anyio.move_on_after(timeout_s):
        return await effect
    raise StillUnderwayError(f"{missed} within {timeout_s:.0f} s; the request stands")
