"""What every call to a reference peer must bring: a state of this version. Must not know what is done with it."""

from __future__ import annotations

from typing import Any, Protocol

import grpc
import grpc.aio

from leyline.v1.state_pb2 import SystemStatePacket

STATE_VERSION = 1
_RUN_ID_LENGTH_MAX = 256


class _WithState(Protocol):
    @property
    def state(self) -> SystemStatePacket: ...


async def require_state(request: _WithState, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """End the call with INVALID_ARGUMENT, naming the field, unless the request's state can be worked with."""
    problem = _problem(request.state)
    if problem:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)


def _problem(state: SystemStatePacket) -> str | None:
    if state.version != STATE_VERSION:
        return f"state.version: is {state.version}; known is {STATE_VERSION}"
    if len(state.training_run_id) > _RUN_ID_LENGTH_MAX:
        return f"state.training_run_id: is longer than {_RUN_ID_LENGTH_MAX} characters"
    return None
