"""Takes in what the lane reports, in its order, and begins what follows from it: records, holds, goes back.

Owns what each report leads to. Must not know when epochs are given to the lane, nor what operators ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from tolaria.training.fences import FenceReport
from tolaria.training.growth import SeedsReport
from tolaria.training.judge import Hold, Proceed, judge
from tolaria.training.laps import Laps
from tolaria.training.recovery.keeper import PointsLost, Restored
from tolaria.training.reports import EpochReport, HeldReport, LaneEnded, ProfileEnded, Report, StepReport
from tolaria.training.safeguards import COLLAPSE, EXPLOSION
from tolaria.training.ties import RunTies
from tolaria.training.verdicts import Halt, Retreat


class Reception:
    """Used on the event loop only.

    Args:
        ties: the run's parts.
        laps: told of what epochs come to.
        void_steps_max: consecutive void steps after which the run is held.
    """

    def __init__(self, ties: RunTies, laps: Laps, *, void_steps_max: int) -> None:
        self._ties = ties
        self._laps = laps
        self._void_steps_max = void_steps_max
        self._recorder, self._progress = ties.recorder, ties.recorder.progress
        self._safeguards = ties.guardian.safeguards

    def take_all(self, reports: Sequence[Report]) -> None:
        """Take a frame of reports, oldest first."""
        for report in reports:
            self._take(report)
        self._recorder.frame_ends(self._ties.link.snapshots())

    def accepts(self, report: EpochReport) -> bool:
        """Judge an epoch; where it is found wanting the run goes back, or is halted, and the answer is no."""
        verdict = self._ties.retreats.epoch(report)
        self._recorder.scale(self._ties.retreats.scale)
        if isinstance(verdict, Proceed):
            return True
        self._safeguards.failing(COLLAPSE)
        # A checkpoint from within that epoch may be as bad as its end.
        validated_step = self._ties.checkpoints.validated_step
        self._enact(verdict, before_step=min(validated_step, report.global_step - 1))
        self._ties.guardian.epoch_over(breach=False)
        return False

    def _take(self, report: Report) -> None:
        match report:
            case StepReport():
                self._take_step(report)
            case EpochReport():
                # Recorded here, in order: fences that the lane passed afterwards may be in the same frame.
                self._recorder.epoch_ends(report, layers=not self._safeguards.mode.on)
                self._laps.reported(report)
            case SeedsReport():
                self._recorder.fence(report, wished=False)
                self._safeguards.rebuilt(report)
            case FenceReport():
                self._take_fence(report)
            case HeldReport():
                self._take_held(report)
            case PointsLost():
                self._recorder.rollbacks.points_lost(report.reason)
            case ProfileEnded():
                self._ties.profiles.take(report)
            case LaneEnded():
                self._ties.link.desk.close()
                self._ties.profiles.close()
                self._laps.ended(report)
                self._ties.feed.changed()
            case _:
                assert_never(report)

    def _take_step(self, step: StepReport) -> None:
        ties = self._ties
        verdict = ties.retreats.step(step, self._progress.health)
        healthy = isinstance(verdict, Proceed) and not ties.rollbacks.running
        self._recorder.step(step, observed=healthy or step.void)
        self._safeguards.step(step)
        ties.profiles.step(step)
        if healthy:
            self._take_healthy(step)
        if not isinstance(verdict, Proceed):
            self._recorder.unhealthy(step, verdict.reason)
            if not step.void:
                self._safeguards.failing(EXPLOSION)
            self._enact(verdict, before_step=step.global_step - (not step.void))
        elif not (ties.conduct.on_hold or ties.rollbacks.running):
            held = judge(self._progress.health, void_steps_max=self._void_steps_max)
            if isinstance(held, Hold):
                ties.conduct.hold(held.reason)

    def _take_healthy(self, step: StepReport) -> None:
        ties = self._ties
        ties.retreats.observed(self._progress.health)
        ties.cadence.step(step)
        ties.rollbacks.step(step)
        ties.checkpoints.stepped(step.global_step)

    def _take_fence(self, report: FenceReport) -> None:
        if isinstance(report.result, Restored):
            self._rewind(report.result)
        self._ties.link.desk.take(report)

    def _take_held(self, report: HeldReport) -> None:
        if self._ties.link.standstill.answered(report.hold):
            self._ties.guardian.held()
            self._ties.feed.changed()

    def _enact(self, verdict: Retreat | Halt, *, before_step: int) -> None:
        match verdict:
            case Retreat():
                self._recorder.scale(self._ties.retreats.scale)  # the budget outlives the process as well
                self._ties.rollbacks.retreat(verdict, target_step=before_step)
            case Halt(reason):
                self._ties.guardian.rollbacks_spent(reason)
            case _:
                assert_never(verdict)

    def _rewind(self, restored: Restored) -> None:
        """The lane has gone back: so does what is known of it here."""
        self._recorder.rewound(restored)
        self._safeguards.mended()
        self._ties.checkpoints.stepped(restored.position.global_step)
        given_up = not restored.underway and restored.latest_order == self._ties.link.order
        self._laps.went_back(restored.place, given_up=given_up)
        self._ties.feed.changed()
