"""The state that a reference peer keeps for each run, and its part in the rollback of that state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio
import structlog

from leyline.v1 import rollback_service_pb2 as rpc
from leyline.v1.rollback_service_pb2_grpc import RollbackParticipantServiceServicer
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.peers.verification import CONTRACT_VERSION

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Call: TypeAlias = Literal["prepare", "commit", "confirm", "abort"]
Phase: TypeAlias = Literal["unseen", "prepared", "committed", "confirmed", "aborted"]
Undo: TypeAlias = Callable[[], None]

_RUNS_MAX = 8
_ROLLBACKS_MAX = 128
_ID_LENGTH_MAX = 128
_RUN_ID_LENGTH_MAX = 256
_log = structlog.get_logger(__name__)

# Phase -> the calls that are allowed in it, each with the phase that follows.
TRANSITIONS: Mapping[Phase, Mapping[Call, Phase]] = {
    # An abort may arrive before its prepare, which is then refused.
    "unseen": {"prepare": "prepared", "abort": "aborted"},
    "prepared": {"commit": "committed", "abort": "aborted"},
    "committed": {"confirm": "confirmed", "abort": "aborted"},
    "confirmed": {},
    "aborted": {},
}
# The phase of an open rollback whose coordinator is gone.
_ABANDONED: Mapping[Phase, Phase] = {"prepared": "aborted", "committed": "confirmed"}


class Revertible(Protocol):
    """State that can be reverted to an earlier step of the run."""

    def revert(self, target_step: int) -> Undo:
        """Restores the newest state at or before `target_step`; calling the result undoes that."""


T = TypeVar("T", bound=Revertible)


class Runs(Generic[T]):
    """One `T` for each run id, made by `create` from the id. The least recently used run is forgotten first."""

    def __init__(self, create: Callable[[str], T]) -> None:
        self._create = create
        self._by_id: OrderedDict[str, T] = OrderedDict()

    async def of_state(self, state: SystemStatePacket, context: Context) -> T:
        """Returns the state of the packet's run; aborts the call with INVALID_ARGUMENT if the packet is invalid."""
        if state.version != CONTRACT_VERSION:
            detail = f"state.version: is {state.version}; only {CONTRACT_VERSION} is supported"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, detail)
        if len(state.training_run_id) > _RUN_ID_LENGTH_MAX:
            detail = f"state.training_run_id: is longer than {_RUN_ID_LENGTH_MAX} characters"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, detail)
        return self.of(state.training_run_id)

    def of(self, run_id: str) -> T:
        """Returns the state of a run, created on first use."""
        if run_id not in self._by_id:
            self._by_id[run_id] = self._create(run_id)
        self._by_id.move_to_end(run_id)
        if len(self._by_id) > _RUNS_MAX:
            self._by_id.popitem(last=False)
        return self._by_id[run_id]

    def revert(self, target_step: int) -> Undo:
        """Reverts the most recently used run: the calls of a rollback do not name their run."""
        if not self._by_id:
            return lambda: None
        return next(reversed(self._by_id.values())).revert(target_step)


@dataclass(slots=True)
class _Rollback:
    target_step: int
    phase: Phase = "unseen"
    accepted: dict[Call, Phase] = field(default_factory=dict)
    undo: Undo | None = None


_Request: TypeAlias = (
    rpc.PrepareRollbackRequest | rpc.CommitRollbackRequest | rpc.ConfirmRollbackRequest | rpc.AbortRollbackRequest
)


class RollbackParticipantService(RollbackParticipantServiceServicer):
    """Executes rollbacks by id; the oldest are forgotten first. A repeated call gets the same answer.

    A refusal is a response with the reason in `detail`, not an error status. A prepare closes the rollbacks that other
    coordinators left open: prepared ones abort, committed ones are confirmed.
    """

    def __init__(self, state: Revertible) -> None:
        self._state = state
        self._rollbacks: OrderedDict[str, _Rollback] = OrderedDict()

    async def PrepareRollback(
        self, request: rpc.PrepareRollbackRequest, context: Context
    ) -> rpc.PrepareRollbackResponse:
        """Promises to revert; changes nothing."""
        return rpc.PrepareRollbackResponse(**self._response("prepare", request))

    async def CommitRollback(self, request: rpc.CommitRollbackRequest, context: Context) -> rpc.CommitRollbackResponse:
        """Reverts to the target step."""
        return rpc.CommitRollbackResponse(**self._response("commit", request))

    async def ConfirmRollback(
        self, request: rpc.ConfirmRollbackRequest, context: Context
    ) -> rpc.ConfirmRollbackResponse:
        """Makes the rollback final: drops the state from before."""
        return rpc.ConfirmRollbackResponse(**self._response("confirm", request))

    async def AbortRollback(self, request: rpc.AbortRollbackRequest, context: Context) -> rpc.AbortRollbackResponse:
        """Withdraws the promise, or undoes the commit."""
        return rpc.AbortRollbackResponse(**self._response("abort", request))

    def answer(self, call: Call, rollback_id: str, target_step: int) -> tuple[bool, str]:
        """Returns whether the call is accepted, and the phase it leads to or the reason of the refusal."""
        if not 0 < len(rollback_id) <= _ID_LENGTH_MAX:
            return False, f"rollback_id must have 1 to {_ID_LENGTH_MAX} characters"
        rollback = self._rollbacks.get(rollback_id) or _Rollback(target_step)
        if target_step != rollback.target_step:
            return False, f"{rollback_id} goes to step {rollback.target_step}, not to {target_step}"
        if call in rollback.accepted:
            return True, rollback.accepted[call]
        phase = TRANSITIONS[rollback.phase].get(call)
        if phase is None:
            return False, f"{call} does not fit: {rollback.phase}"
        if call == "prepare":
            for other in self._rollbacks.values():
                if other.phase in _ABANDONED:
                    self._enter(other, _ABANDONED[other.phase])
        self._enter(rollback, phase)
        rollback.accepted[call] = phase
        self._rollbacks[rollback_id] = rollback
        if len(self._rollbacks) > _ROLLBACKS_MAX:
            self._rollbacks.popitem(last=False)
        return True, phase

    def _enter(self, rollback: _Rollback, phase: Phase) -> None:
        if phase == "committed":
            rollback.undo = self._state.revert(rollback.target_step)
        elif phase == "aborted" and rollback.undo is not None:
            rollback.undo()
        if phase != "committed":
            rollback.undo = None  # it refers to the whole former history
        rollback.phase = phase

    def _response(self, call: Call, request: _Request) -> dict[str, Any]:
        accepted, detail = self.answer(call, request.rollback_id, request.target_step)
        _log.info(
            "rollback",
            call=call,
            rollback_id=request.rollback_id[:_ID_LENGTH_MAX],
            target_step=request.target_step,
            reason=request.reason[:_ID_LENGTH_MAX],
            accepted=accepted,
            detail=detail,
        )
        return {"rollback_id": request.rollback_id, "accepted": accepted, "detail": detail}
