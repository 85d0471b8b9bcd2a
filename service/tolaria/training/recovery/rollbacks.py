"""Where rollbacks are asked for, by operators, Tamiyo, an emergency or the judge, and what belongs around each.

Owns the one that runs: the lane stands from its asking on, afterwards spoilt batches are left out and the learning
rate is cut, and then training goes on. Must not know how the state is found and copied.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio
import structlog

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_UNSPECIFIED, RollbackTier
from tolaria.errors import TolariaError, WrongStateError
from tolaria.optimization import Adjustment
from tolaria.rollback.coordinator import RollbackCoordinator
from tolaria.rollback.orders import Ending, RollbackOutcome, RollbackRequest
from tolaria.training.fence_desk import FenceDesk
from tolaria.training.fences import ChangeOptimizer, FenceCommand, FenceReport, LeaveOut, OptimizerChanged
from tolaria.training.record_rollback import RollbackRecorder
from tolaria.training.recovery.retreats import Retreats
from tolaria.training.reports import StepReport
from tolaria.training.standstill import Standstill
from tolaria.training.verdicts import RateCut, Retreat

_ROLLBACK = "rollback"
_JUDGE = "judge"
# Small commands to a lane that stands already.
_AFTERMATH_S = 5.0


@dataclass(frozen=True, slots=True)
class Asked:
    """What somebody asks for. `target_step` None: the newest point. `cut`: of the learning rate afterwards."""

    tier: RollbackTier.ValueType
    target_step: int | None
    reason: str
    origin: str
    cut: RateCut | None = None


@dataclass(slots=True)
class Errand:
    """One rollback on its way; `outcome` is there once it is `over`."""

    asked: Asked
    request: RollbackRequest
    began_s: float
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
        missed: told, in words, of a deadline that was missed.
        changed: called after something has changed that a status shows.
    """

    standstill: Standstill
    desk: FenceDesk
    retreats: Retreats
    recorder: RollbackRecorder
    adjusted: Callable[[Adjustment, OptimizerChanged], None]
    supersede: Callable[[int], Awaitable[None]]
    missed: Callable[[str], None]
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
        self.completed = 0
        """Rollbacks that restored a state."""

    @property
    def running(self) -> bool:
        """Whether one is under way."""
        return self._errand is not None

    async def serve(self) -> None:
        """Carry out what is asked for until cancelled."""
        while True:
            await self._asked.wait()
            self._asked = anyio.Event()
            if (errand := self._errand) is not None:
                await self._carry_out(errand)

    def begin(self, asked: Asked) -> Errand:
        """Begin at once; the lane is told to stand.

        Raises:
            WrongStateError: another one is under way.
        """
        if self._errand is not None:
            raise WrongStateError("another rollback is running")
        request = RollbackRequest(
            rollback_id=uuid.uuid4().hex,
            tier=asked.tier,
            target_step=asked.target_step,
            global_step=self._global_step(),
            reason=asked.reason,
        )
        errand = self._errand = Errand(asked, request, self._clock())
        self._ties.standstill.want(_ROLLBACK)
        self._log.warning("rolling_back", rollback_id=request.rollback_id, origin=asked.origin, reason=asked.reason)
        self._asked.set()
        return errand

    async def carry_out(self, asked: Asked) -> RollbackOutcome:
        """Roll back and wait for it; whoever waits may go away meanwhile.

        Raises:
            TolariaError: why nothing was restored; the live state is as it was.
        """
        errand = self.begin(asked)
        await errand.over.wait()
        outcome = errand.outcome
        if outcome is None or outcome.ending is not Ending.RESTORED:
            raise (outcome and outcome.error) or WrongStateError("the rollback was given up")
        return outcome

    def retreat(self, verdict: Retreat, *, target_step: int) -> None:
        """Go back by the judge's verdict to before `target_step` went wrong; one that is under way already suffices."""
        # What memory has is better than nothing, and what disk has is better than going on.
        tier = ROLLBACK_TIER_UNSPECIFIED if verdict.tier == ROLLBACK_TIER_FAST else verdict.tier
        if self._errand is None:
            self.begin(Asked(tier, target_step, verdict.reason, _JUDGE, verdict.cut))

    def go_back_if_calm(self, reason: str, origin: str) -> None:
        """Go back to the newest snapshot because an emergency asks for it; one that is under way already suffices."""
        if self._errand is None:
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
            if outcome.ending is Ending.RESTORED:
                await self._after_restoring(errand, outcome)
        finally:
            ties.retreats.over()
            self._errand = None
            ties.standstill.let_go(_ROLLBACK)
            errand.over.set()
        ties.recorder.ended(outcome, errand.asked.reason)
        if outcome.ending is Ending.DEADLINE_EXCEEDED:
            ties.missed(errand.asked.reason)
        ties.changed()

    async def _after_restoring(self, errand: Errand, outcome: RollbackOutcome) -> None:
        """The lane stands at what was restored: everything that must be so before the next step is done now."""
        self.completed += 1
        self._awaited = errand if not self._ties.standstill.others_than(_ROLLBACK) else None
        if spoiled := self._ties.retreats.over():
            await self._have_done(LeaveOut(spoiled))
        if (cut := errand.asked.cut) is not None:
            await self._cut(cut, outcome)
        await self._ties.supersede(outcome.restored_step)

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
