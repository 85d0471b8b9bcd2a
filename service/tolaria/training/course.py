"""The task that takes a run from its first epoch to its end: gives epochs to the lane, and crosses their boundaries.

Owns the order of events. Never computes, never waits without a bound while training stands.
"""

from __future__ import annotations

import time
from contextlib import suppress

import anyio
import structlog

from tolaria.errors import LaneFailedError, TolariaError
from tolaria.training.laps import Laps
from tolaria.training.packet import state_packet
from tolaria.training.reception import Reception
from tolaria.training.recovery.checkpoints import Evaluation
from tolaria.training.recovery.startup import RunOutcome
from tolaria.training.reports import EpochReport
from tolaria.training.run_state import RunEvent
from tolaria.training.ties import RunPlan, RunTies

_LAST_CHECKPOINT_S = 30.0


class Course:
    """Used on the event loop only.

    Args:
        ties: the run's parts.
        plan: how long it goes.
        laps: of the lane.
        reception: of its reports.
    """

    def __init__(self, ties: RunTies, plan: RunPlan, laps: Laps, reception: Reception) -> None:
        self._ties = ties
        self._plan = plan
        self._laps = laps
        self._reception = reception
        self._progress = ties.recorder.progress
        self._stopping = False
        self._log = structlog.get_logger()
        self.ending: RunOutcome = "drained"
        """How the run leaves this process, once it has ended."""

    async def run(self) -> None:
        """Train all epochs, or until stopped. Ends in FINISHED, or in FAILED when the job's own code raised."""
        self._ties.link.start(self._reception.take_all)
        self._ties.conduct.enter(RunEvent.STARTED, self._progress.state_reason)
        try:
            await self._train()
            await self._end_lane()
        except LaneFailedError as error:
            self._log.error("training_failed", error=str(error), exc_info=error.__cause__)
            self.ending = "failed"
            self._ties.conduct.enter(RunEvent.FAILED, str(error))
        else:
            reason = self._progress.state_reason if self._stopping else "all epochs done"
            self._ties.conduct.enter(RunEvent.FINISHED, reason)

    async def keep_last(self, why: str) -> None:
        """Have a last checkpoint written, where any are, before the run leaves; not for longer than a while.

        What a rollback is about to undo is not worth keeping: it is waited for.
        """
        if self._plan.keeps:
            with anyio.move_on_after(_LAST_CHECKPOINT_S), suppress(TolariaError):  # told by the desk
                await self._rollback_over()
                if not self._ties.rollbacks.unproven:  # else a restart would go on from what nobody has captured
                    await self._ties.checkpoints.create(why)

    def stop(self) -> None:
        """Have the lane finish its step, and `run` end."""
        self._stopping = True
        self._ties.link.stop()

    async def _train(self) -> None:
        laps = self._laps
        while self.ending != "finished" and not self._stopping:
            if laps.next_epoch > self._plan.epochs:
                await self._finish()
            elif (report := await self._run_epoch()) is not None:
                await self._cross_boundary(report)
            await self._rollback_over()

    async def _rollback_over(self) -> None:
        ties, laps = self._ties, self._laps
        await ties.feed.until(lambda: not ties.rollbacks.running or laps.lane_ended)

    async def _finish(self) -> None:
        """All epochs are done. A run that would stand for want of a checkpoint does not leave without its last one."""
        ties, laps = self._ties, self._laps
        await self.keep_last("all epochs are done")
        if self._plan.insists:
            await ties.feed.until(lambda: not ties.checkpoints.failing or self._stopping or laps.lane_ended)
        if laps.next_epoch > self._plan.epochs and not (self._stopping or ties.rollbacks.running):
            self.ending = "finished"

    async def _run_epoch(self) -> EpochReport | None:
        """Let the lane run the next epoch, or the rest of it; None when the run was stopped in it, or went back."""
        self._laps.begin()
        if self._progress.epoch != self._laps.next_epoch:
            self._ties.recorder.epoch_begins(self._laps.next_epoch)
        self._ties.link.run_epoch()
        return await self._laps.over()

    async def _cross_boundary(self, report: EpochReport) -> None:
        if not self._reception.accepts(report):
            return  # what the controller would say of this epoch is of no use any more
        ties, policy = self._ties, self._ties.boundary.policy
        state = state_packet(self._progress, report, wall_ns=time.time_ns())
        await ties.boundary.wait_for_answer(state, self._progress.refusals, since_s=report.finished_at_s)
        if not self._laps.stands(report):
            return  # the run has gone back meanwhile: there is no state any more to which its figures belong
        held_up_s = time.monotonic() - report.finished_at_s
        breach = ties.recorder.boundary(report, held_up_s, policy.budget_s, binding=not policy.patient)
        ties.guardian.epoch_over(breach=breach)
        ties.feed.changed()
        await self._rollback_over()
        if self._laps.stands(report):  # else there is nothing to keep any more
            found = report.evaluation
            ties.checkpoints.epoch_over(Evaluation(report.global_step, report.epoch, found.accuracy, found.loss))

    async def _end_lane(self) -> None:
        self._ties.link.stop()
        await self._laps.lane_over()
