"""Where rollbacks are asked for, by operators, Tamiyo, an emergency or the judge, and what belongs around each.

Owns the one that runs: the lane stands from its asking on, afterwards spoilt batches are left out and the learning
rate is cut, and then training goes on. Must not know how the state is found and copied.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import anyio
import structlog

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_UNSPECIFIED, RollbackTier
from tolaria.errors import InvalidFieldError, TolariaError, WrongStateError
from tolaria.rollback.coordinator import RollbackCoordinator
from tolaria.rollback.orders import ID_BYTES_MAX, Ending, RollbackOutcome, RollbackRequest
from tolaria.training.fence_desk import FenceDesk
from tolaria.training.fences import (
    BatchesLeftOut,
    ChangeOptimizer,
    FenceCommand,
    FenceReport,
    LeaveOut,
    OptimizerChanged,
)
from tolaria.training.record_rollback import RollbackRecorder
from tolaria.training.recovery.retreats import Retreats
from tolaria.training.reports import StepReport
from tolaria.training.standstill import Standstill
from tolaria.training.verdicts import RateCut, Retreat
from tolaria.values.optimization import Adjustment

_ROLLBACK = "rollback"
_JUDGE = "judge"
# Small commands to a lane that stands already.
_AFTERMATH_S = 5.0
# One small transaction; the lane stands meanwhile.
_SUPERSEDE_S: Final = 1.0
_ERRANDS_KEPT: Final = 64
_BATCHES_LOGGED_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class Asked:
    """What somebody asks for.

    `target_step` None: the newest point that is stable. `cut`: of the learning rate afterwards. Two with the same
    `request_id` are one, however often it is asked for; empty: this is one of its own.
    """

    tier: RollbackTier.ValueType
    target_step: int | None
    reason: str
    origin: str
    cut: RateCut | None = None
    request_id: str = ""


def _to_nobody(_outcome: RollbackOutcome) -> None:
    pass


@dataclass(slots=True)
class Errand:
    """One rollback on its way; `outcome` is there once it is `over`, and `on_over` is told of it."""

    asked: Asked
    request: RollbackRequest
    began_s: float
    on_over: Callable[[RollbackOutcome], None] = _to_nobody
    over: anyio.Event = field(default_factory=anyio.Event)
    outcome: RollbackOutcome | None = None


@dataclass(frozen=True, slots=True)
class RollbackTies:
    """What a rollback has to do with the rest of the run.

    Args:
        standstill: makes the lane stand.
        desk: where the lane is asked.
        retreats: tells which batches were spoilt.
        recorder: of metrics and events.
        adjusted: told of the cut of the learning rate.
        supersede: marks the checkpoints after a step as not to be resumed from.
        missed: told, in words, of a deadline that was missed, before the lane goes on.
        unproven: told likewise of live state that was overwritten with what was not captured.
        ended: whether the run has ended, or is about to.
        changed: called after something has changed that a status shows.
    """

    standstill: Standstill
    desk: FenceDesk
    retreats: Retreats
    recorder: RollbackRecorder
    adjusted: Callable[[Adjustment, OptimizerChanged], None]
    supersede: Callable[[int], Awaitable[None]]
    missed: Callable[[str], None]
    unproven: Callable[[str], None]
    ended: Callable[[], bool]
    changed: Callable[[], None]


class RollbackDesk:
    """Carries rollbacks out, one at a time, in a task of its own. Used on the event loop only.

    Args:
        coordinator: of the run's participants.
        ties: see there.
        global_step: the updates done, for the journal.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        coordinator: RollbackCoordinator,
        ties: RollbackTies,
        *,
        global_step: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._coordinator = coordinator
        self._ties = ties
        self._global_step = global_step
        self._clock = clock
        self._log = structlog.get_logger()
        self._asked = anyio.Event()
        self._errand: Errand | None = None
        self._awaited: Errand | None = None
        self._errands: OrderedDict[str, Errand] = OrderedDict()
        self.completed = 0
        """Rollbacks that restored a state."""
        self.unproven = False
        """Whether the live state is what the last rollback left, and not what it should have brought back."""

    @property
    def running(self) -> bool:
        """Whether one is under way."""
        return self._errand is not None

    @property
    def healthy_step(self) -> int | None:
        """The newest step after which training was known to be well; None: nothing has ever gone wrong."""
        return self._ties.retreats.healthy_step

    async def serve(self) -> None:
        """Carry out what is asked for until cancelled."""
        while True:
            await self._asked.wait()
            self._asked = anyio.Event()
            if (errand := self._errand) is not None:
                await self._carry_out(errand)

    def begin(self, asked: Asked, on_over: Callable[[RollbackOutcome], None] = _to_nobody) -> Errand:
        """Begin at once; the lane is told to stand, and `on_over` what has become of it.

        Raises:
            WrongStateError: another one is under way, or the run has ended.
        """
        if self._ties.ended():
            raise WrongStateError("the run has ended: there is nothing that could go back")
        if self._errand is not None:
            raise WrongStateError("another rollback is running")
        request = RollbackRequest(
            rollback_id=_id_of(asked.request_id) if asked.request_id else uuid.uuid4().hex,
            tier=asked.tier,
            target_step=self.healthy_step if asked.target_step is None else asked.target_step,
            global_step=self._global_step(),
            reason=asked.reason,
        )
        self._stop_awaiting()
        errand = self._errand = Errand(asked, request, self._clock(), on_over)
        self._remember(errand)
        self._ties.standstill.want(_ROLLBACK)
        self._log.warning("rolling_back", rollback_id=request.rollback_id, origin=asked.origin, reason=asked.reason)
        self._asked.set()
        return errand

    async def carry_out(self, asked: Asked) -> RollbackOutcome:
        """Roll back and wait for it; whoever waits may go away meanwhile, and come again by the same request_id.

        Raises:
            RestoreUnprovenError: the live state was overwritten and is not what was captured; the run is halted.
            InvalidFieldError: the request_id was another rollback's.
            TolariaError: why nothing was restored; the live state is as it was.
        """
        errand = self._repeated(asked) or self.begin(asked)
        await errand.over.wait()
        outcome = errand.outcome
        if outcome is None or outcome.ending is not Ending.RESTORED:
            raise (outcome and outcome.error) or WrongStateError("the rollback was given up")
        return outcome

    def retreat(self, verdict: Retreat, *, target_step: int) -> None:
        """Go back by the judge's verdict to before `target_step` went wrong; one that is under way already suffices."""
        # What memory has is better than nothing, and what disk has is better than going on.
        tier = ROLLBACK_TIER_UNSPECIFIED if verdict.tier == ROLLBACK_TIER_FAST else verdict.tier
        if self._errand is None and not self._ties.ended():
            self.begin(Asked(tier, target_step, verdict.reason, _JUDGE, verdict.cut))

    def go_back_if_calm(self, reason: str, origin: str) -> None:
        """Go back to a snapshot because an emergency asks for it; one that is under way already suffices."""
        if self._errand is None and not self._ties.ended():
            self.begin(Asked(ROLLBACK_TIER_FAST, None, reason, origin))

    def step(self, step: StepReport) -> None:
        """One more step is done: the first good one after a rollback ends its time."""
        errand = self._awaited
        if errand is None or step.void or errand.outcome is None:
            return
        self._awaited = None
        duration_s = step.finished_at_s - errand.began_s  # both monotonic; the report itself comes a frame later
        self._ties.recorder.lasted(errand.outcome.tier, errand.outcome.ending.value, duration_s)
        self._log.info("training_again", step=step.global_step, after_ms=round(duration_s * 1000, 3))

    async def _carry_out(self, errand: Errand) -> None:
        ties = self._ties
        try:
            outcome = errand.outcome = await self._coordinator.roll_back(errand.request)
            await self._settle(errand, outcome)
        finally:
            ties.retreats.over()
            self._errand = None
            ties.standstill.let_go(_ROLLBACK)
            errand.over.set()
        errand.on_over(outcome)
        ties.changed()

    async def _settle(self, errand: Errand, outcome: RollbackOutcome) -> None:
        """What must be so before the lane goes on, by how it ended."""
        self.unproven = outcome.unproven or (self.unproven and outcome.ending is not Ending.RESTORED)
        if outcome.unproven:
            self._ties.unproven(str(outcome.error))
        elif outcome.ending is Ending.DEADLINE_EXCEEDED:
            self._ties.missed(errand.asked.reason)
        self._ties.recorder.ended(outcome, errand.asked.reason)
        if outcome.ending is Ending.RESTORED:
            await self._after_restoring(errand, outcome)
        elif outcome.unproven:
            await self._supersede(outcome.restored_step)

    async def _after_restoring(self, errand: Errand, outcome: RollbackOutcome) -> None:
        """The lane stands at what was restored: everything that must be so before the next step is done now."""
        self.completed += 1
        self._awaited = errand
        if self._ties.standstill.others_than(_ROLLBACK):
            self._stop_awaiting()
        if spoiled := self._ties.retreats.over():
            await self._leave_out(spoiled, outcome.rollback_id)
        if (cut := errand.asked.cut) is not None:
            await self._cut(cut, outcome)
        await self._supersede(outcome.restored_step)

    async def _leave_out(self, spoiled: frozenset[tuple[int, int]], rollback_id: str) -> None:
        report = await self._have_done(LeaveOut(spoiled))
        if report is not None and isinstance(report.result, BatchesLeftOut):
            self._log.warning(
                "batches_left_out",
                rollback_id=rollback_id,
                epochs_and_places=sorted(spoiled)[:_BATCHES_LOGGED_MAX],
                count=len(spoiled),
                count_in_all=report.result.count,
            )

    async def _supersede(self, step: int) -> None:
        with anyio.move_on_after(_SUPERSEDE_S) as scope:
            await self._ties.supersede(step)
        if scope.cancelled_caught:
            self._log.error("checkpoints_not_superseded", after_step=step, detail="the journal did not answer")

    def _stop_awaiting(self) -> None:
        """No step will soon end the last rollback's time: it lasted until the state was back."""
        awaited, self._awaited = self._awaited, None
        if awaited is not None and (outcome := awaited.outcome) is not None:
            self._ties.recorder.lasted(outcome.tier, outcome.ending.value, outcome.latency_ms / 1000)

    def _repeated(self, asked: Asked) -> Errand | None:
        """The errand of the same request."""
        errand = self._errands.get(_id_of(asked.request_id)) if asked.request_id else None
        if errand is not None and errand.asked != asked:
            raise InvalidFieldError("request_id", "was used for another rollback already")
        return errand

    def _remember(self, errand: Errand) -> None:
        if errand.asked.request_id:
            self._errands[errand.request.rollback_id] = errand
            if len(self._errands) > _ERRANDS_KEPT:
                self._errands.popitem(last=False)

    async def _cut(self, cut: RateCut, outcome: RollbackOutcome) -> None:
        adjustment = Adjustment(
            group=None,
            factor=cut.factor,
            value=None,
            expires_after_steps=cut.steps,
            origin=_ROLLBACK,
            request_id=outcome.rollback_id,
            reason="what went wrong, went wrong at the rate before",
        )
        report = await self._have_done(ChangeOptimizer(adjustment, {}, None))
        if report is not None and isinstance(report.result, OptimizerChanged):
            self._ties.adjusted(adjustment, report.result)

    async def _have_done(self, command: FenceCommand) -> FenceReport | None:
        """The state is back; whatever stands in the way of the rest must not undo that."""
        try:
            with anyio.move_on_after(_AFTERMATH_S):
                return await self._ties.desk.carry_out(command)
        except TolariaError as error:
            self._log.error("after_rollback_failed", command=type(command).__name__, error=str(error))
            return None
        self._log.error("after_rollback_failed", command=type(command).__name__, error="the lane did not answer")
        return None


def _id_of(request_id: str) -> str:
    """The rollback_id of a request: its own id where the board has room for that."""
    encoded = request_id.encode()
    return request_id if len(encoded) <= ID_BYTES_MAX else hashlib.sha256(encoded).hexdigest()
