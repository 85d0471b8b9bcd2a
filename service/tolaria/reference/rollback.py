"""A reference peer's part in a rollback: prepare, commit, confirm or abort, each answered the same when asked again.

Owns the order of the calls. What is reverted comes in as `Revertible`; the calls' own gRPC deadlines bound them, since
no work here takes time.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc.aio
import structlog

from leyline.v1.rollback_service_pb2 import (
    AbortRollbackRequest,
    AbortRollbackResponse,
    CommitRollbackRequest,
    CommitRollbackResponse,
    ConfirmRollbackRequest,
    ConfirmRollbackResponse,
    PrepareRollbackRequest,
    PrepareRollbackResponse,
)
from leyline.v1.rollback_service_pb2_grpc import RollbackParticipantServiceServicer
from tolaria.reference.runs import Revertible, Undo

_ROLLBACKS_MAX = 128
_ID_LENGTH_MAX = 128
_log = structlog.get_logger(__name__)


class Call(enum.Enum):
    """What a coordinator asks."""

    PREPARE = "prepare"
    COMMIT = "commit"
    CONFIRM = "confirm"
    ABORT = "abort"


class Phase(enum.Enum):
    """How far a rollback is."""

    UNSEEN = "unseen"
    PREPARED = "prepared"
    COMMITTED = "committed"
    CONFIRMED = "confirmed"
    ABORTED = "aborted"


# Phase -> the calls that fit, each with the phase after it: every transition lives here.
TRANSITIONS: Mapping[Phase, Mapping[Call, Phase]] = {
    # An abort may overtake its prepare; the prepare is then refused.
    Phase.UNSEEN: {Call.PREPARE: Phase.PREPARED, Call.ABORT: Phase.ABORTED},
    Phase.PREPARED: {Call.COMMIT: Phase.COMMITTED, Call.ABORT: Phase.ABORTED},
    Phase.COMMITTED: {Call.CONFIRM: Phase.CONFIRMED, Call.ABORT: Phase.ABORTED},
    Phase.CONFIRMED: {},
    Phase.ABORTED: {},
}


@dataclass(frozen=True, slots=True)
class RollbackAnswer:
    """Whether a call was accepted, and what it did or why not."""

    accepted: bool
    detail: str


@dataclass(slots=True)
class _Rollback:
    target_step: int
    phase: Phase = Phase.UNSEEN
    answered: dict[Call, RollbackAnswer] = field(default_factory=dict)
    undo: Undo | None = None


class Participant:
    """The rollbacks that a peer was asked about; the oldest are forgotten first.

    The newest prepare wins: whatever another coordinator left open is aborted where it was prepared, and stays where it
    was committed.
    """

    def __init__(self, reverted: Revertible) -> None:
        self._reverted = reverted
        self._rollbacks: OrderedDict[str, _Rollback] = OrderedDict()

    def answer(self, call: Call, rollback_id: str, target_step: int) -> RollbackAnswer:
        """Answer one call. A call that was accepted before gets that answer again; one out of order changes nothing."""
        if not 0 < len(rollback_id) <= _ID_LENGTH_MAX:
            return RollbackAnswer(accepted=False, detail=f"rollback_id must have 1 to {_ID_LENGTH_MAX} characters")
        rollback = self._rollbacks.get(rollback_id) or _Rollback(target_step)
        if target_step != rollback.target_step:
            detail = f"{rollback_id} goes to step {rollback.target_step}, not to {target_step}"
            return RollbackAnswer(accepted=False, detail=detail)
        if call in rollback.answered:
            return rollback.answered[call]
        phase = TRANSITIONS[rollback.phase].get(call)
        if phase is None:
            return RollbackAnswer(accepted=False, detail=f"{call.value} does not fit: {rollback.phase.value}")
        if call is Call.PREPARE:
            self._close_open_ones()
        self._enter(rollback, phase)
        rollback.answered[call] = RollbackAnswer(accepted=True, detail=phase.value)
        self._remember(rollback_id, rollback)
        return rollback.answered[call]

    def _close_open_ones(self) -> None:
        for rollback in self._rollbacks.values():
            if rollback.phase is Phase.PREPARED:
                self._enter(rollback, TRANSITIONS[rollback.phase][Call.ABORT])
            elif rollback.phase is Phase.COMMITTED:
                self._enter(rollback, TRANSITIONS[rollback.phase][Call.CONFIRM])

    def _enter(self, rollback: _Rollback, phase: Phase) -> None:
        if phase is Phase.COMMITTED:
            rollback.undo = self._reverted.revert(rollback.target_step)
        elif phase is Phase.ABORTED and rollback.undo is not None:
            rollback.undo()
        if phase is not Phase.COMMITTED:
            rollback.undo = None  # it holds the whole history from before
        rollback.phase = phase

    def _remember(self, rollback_id: str, rollback: _Rollback) -> None:
        self._rollbacks[rollback_id] = rollback
        if len(self._rollbacks) > _ROLLBACKS_MAX:
            self._rollbacks.popitem(last=False)


class _Request(Protocol):
    @property
    def rollback_id(self) -> str: ...
    @property
    def target_step(self) -> int: ...
    @property
    def reason(self) -> str: ...


class RollbackParticipantService(RollbackParticipantServiceServicer):
    """The four calls over a `Participant`. Answers are never error statuses: a refusal says why in `detail`."""

    def __init__(self, reverted: Revertible) -> None:
        self._participant = Participant(reverted)

    async def PrepareRollback(  # noqa: N802 - the contract's name
        self,
        request: PrepareRollbackRequest,
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002 - the contract's signature
    ) -> PrepareRollbackResponse:
        """Promise to revert. Nothing changes yet."""
        answer = self._answer(Call.PREPARE, request)
        return PrepareRollbackResponse(rollback_id=request.rollback_id, accepted=answer.accepted, detail=answer.detail)

    async def CommitRollback(  # noqa: N802 - the contract's name
        self,
        request: CommitRollbackRequest,
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002 - the contract's signature
    ) -> CommitRollbackResponse:
        """Revert to the target step."""
        answer = self._answer(Call.COMMIT, request)
        return CommitRollbackResponse(rollback_id=request.rollback_id, accepted=answer.accepted, detail=answer.detail)

    async def ConfirmRollback(  # noqa: N802 - the contract's name
        self,
        request: ConfirmRollbackRequest,
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002 - the contract's signature
    ) -> ConfirmRollbackResponse:
        """Forget how it was before: the rollback stands."""
        answer = self._answer(Call.CONFIRM, request)
        return ConfirmRollbackResponse(rollback_id=request.rollback_id, accepted=answer.accepted, detail=answer.detail)

    async def AbortRollback(  # noqa: N802 - the contract's name
        self,
        request: AbortRollbackRequest,
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002 - the contract's signature
    ) -> AbortRollbackResponse:
        """Give the promise back, or undo what was committed."""
        answer = self._answer(Call.ABORT, request)
        return AbortRollbackResponse(rollback_id=request.rollback_id, accepted=answer.accepted, detail=answer.detail)

    def _answer(self, call: Call, request: _Request) -> RollbackAnswer:
        answer = self._participant.answer(call, request.rollback_id, request.target_step)
        _log.info(
            "rollback",
            call=call.value,
            rollback_id=request.rollback_id[:_ID_LENGTH_MAX],
            target_step=request.target_step,
            reason=request.reason[:_ID_LENGTH_MAX],
            accepted=answer.accepted,
            detail=answer.detail,
        )
        return answer
