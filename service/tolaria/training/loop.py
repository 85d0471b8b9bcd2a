"""The training loop as the event loop sees it: gives epochs to the lane, reads its reports, enacts verdicts.

Owns the run's state and its order of events. Never computes, never touches a tensor, never waits without a bound while
training stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import assert_never

import anyio
import structlog

from leyline.v1.admin_service_pb2 import (
    RUN_STATE_PAUSED,
    AdjustLearningRateRequest,
    GetStatusResponse,
)
from tolaria.config import CheckpointSettings, ControlSettings, TrainingSettings
from tolaria.errors import LaneFailedError, TolariaError, WrongStateError
from tolaria.rollback import CheckpointRow
from tolaria.rollback.orders import RollbackOutcome
from tolaria.training.boundary import Boundary, BoundaryPolicy
from tolaria.training.cadence import StepCadence
from tolaria.training.consult import Consultant, Consultation
from tolaria.training.enact import Enactor
from tolaria.training.feed import StatusFeed
from tolaria.training.fences import FenceReport
from tolaria.training.growth import SeedsReport
from tolaria.training.guardian import Guardian
from tolaria.training.holding import Holding
from tolaria.training.judge import Hold, Proceed, judge
from tolaria.training.lane_link import LaneLink
from tolaria.training.packet import state_packet, status_message
from tolaria.training.profile_desk import ProfileDesk, ProfileTaken
from tolaria.training.record import Recorder
from tolaria.training.recovery.checkpoints import CheckpointDesk, Evaluation
from tolaria.training.recovery.keeper import PointsLost, Restored
from tolaria.training.recovery.retreats import Retreats
from tolaria.training.recovery.rollbacks import Asked, RollbackDesk
from tolaria.training.recovery.startup import RunOutcome
from tolaria.training.reports import EpochReport, HeldReport, LaneEnded, ProfileEnded, Report, StepReport
from tolaria.training.run_state import RunEvent, after
from tolaria.training.safeguards import COLLAPSE, EXPLOSION, PEER_FAILURE
from tolaria.training.verdicts import Halt, Retreat

_LEAVING = "leaving"
_LAST_CHECKPOINT_S = 30.0


class TrainingLoop:
    """One run. `run` is the task; everything else answers operators and peers while it goes on.

    Args:
        link: to the lane, which has not been started.
        training: how long, how.
        control: budgets and bounds.
        checkpointing: whether there are checkpoints.
        patience_s: how long a deterministic boundary waits for the peers.
        recorder: writes progress, metrics and events.
        guardian: safeguards and emergencies; told to halt this run where one asks for it.
        rollbacks: where the run goes back; served by somebody else.
        retreats: says when it has to by itself.
        make_checkpoints: given how the run is held and let go on, makes the desk of its checkpoints.
        profiles: where profiles are asked for.
        feed: told of every change.
        make_consultant: given what to call with settled consultations, makes the one to ask.
    """

    def __init__(
        self,
        link: LaneLink,
        *,
        training: TrainingSettings,
        control: ControlSettings,
        checkpointing: CheckpointSettings,
        patience_s: float,
        recorder: Recorder,
        guardian: Guardian,
        rollbacks: RollbackDesk,
        retreats: Retreats,
        make_checkpoints: Callable[[Callable[[str], bool], Callable[[str], None]], CheckpointDesk],
        profiles: ProfileDesk,
        feed: StatusFeed,
        make_consultant: Callable[[Callable[[Consultation], None]], Consultant],
    ) -> None:
        self._link = link
        self._training = training
        self._control = control
        self._checkpointing = checkpointing
        self._recorder = recorder
        self._progress = recorder.progress
        self._guardian, self._safeguards = guardian, guardian.safeguards
        self._retreats = retreats
        self._profiles = profiles
        self._log = structlog.get_logger()
        self.feed = feed
        self.rollbacks = rollbacks
        self._holding = Holding(link.standstill, recorder, guardian, feed)
        self.checkpoints = make_checkpoints(self._holding.hold_where_none_does, self._holding.go_on)
        self.consultant = make_consultant(self._settle)
        self._policy = BoundaryPolicy.of(control, patient=training.deterministic, patience_s=patience_s)
        self._boundary = Boundary(self.consultant, self._policy)
        self._cadence = StepCadence(self.consultant, self._progress, interval=control.step_interval)
        self._enactor = Enactor(
            link.desk, recorder, hold=self._holding.hold, guardian=guardian, rollbacks=rollbacks, changed=feed.changed
        )
        recorder.begin(link.rig)
        self._next_epoch = link.rig.epoch.number + link.rig.epoch.over
        self._epoch_report: EpochReport | None = None
        self._epoch_over = anyio.Event()
        self._lane_ended: LaneEnded | None = None
        self._stopping = False
        self.ending: RunOutcome = "drained"
        """How the run leaves this process, once it has ended."""
        guardian.watch(self._holding.halt, rollbacks.go_back_if_calm)

    # -- the task ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Train all epochs, or until stopped. Ends in FINISHED, or in FAILED when the job's own code raised."""
        self._link.start(self._take_all)
        self._holding.enter(RunEvent.STARTED, self._progress.state_reason)
        try:
            while self.ending != "finished" and not self._stopping:
                if self._next_epoch > self._training.epochs:
                    await self._finish()
                elif (report := await self._run_epoch()) is not None:
                    await self._cross_boundary(report)
                await self.feed.until(lambda: not self.rollbacks.running or self._lane_ended is not None)
            await self._end_lane()
        except LaneFailedError as error:
            self._log.error("training_failed", error=str(error), exc_info=error.__cause__)
            self.ending = "failed"
            self._holding.enter(RunEvent.FAILED, str(error))
        else:
            reason = self._progress.state_reason if self._stopping else "all epochs done"
            self._holding.enter(RunEvent.FINISHED, reason)

    async def _run_epoch(self) -> EpochReport | None:
        """Let the lane run the next epoch, or the rest of it; None when the run was stopped in it, or went back."""
        self._epoch_over, self._epoch_report = anyio.Event(), None
        if self._progress.epoch != self._next_epoch:
            self._recorder.epoch_begins(self._next_epoch)
        self._link.run_epoch()
        await self._epoch_over.wait()
        self._raise_if_lane_failed()
        return self._epoch_report

    async def _cross_boundary(self, report: EpochReport) -> None:
        verdict = self._retreats.epoch(report)
        self._recorder.epoch_ends(report, layers=not self._safeguards.mode.on)
        if not isinstance(verdict, Proceed):  # what the controller would say of this epoch is of no use any more
            self._safeguards.failing(COLLAPSE)
            self._enact_verdict(verdict, before_step=min(self.checkpoints.validated_step, report.global_step - 1))
            return
        state = state_packet(self._progress, report, wall_ns=time.time_ns())
        await self._boundary.wait_for_answer(state, self._progress.refusals, since_s=report.finished_at_s)
        if self._epoch_report is not report:
            return  # the run has gone back meanwhile: to this epoch's figures there is no state any more
        held_up_s = time.monotonic() - report.finished_at_s
        breach = self._recorder.boundary(report, held_up_s, self._policy.budget_s, binding=not self._policy.patient)
        self._guardian.epoch_over(breach=breach)
        found = report.evaluation
        self.checkpoints.epoch_over(Evaluation(report.global_step, report.epoch, found.accuracy, found.loss))
        self.feed.changed()

    async def _finish(self) -> None:
        """All epochs are done. Where a run stands without checkpoints, it does not leave without its last one."""
        await self.keep_last("all epochs are done")
        if self._checkpointing.on_failure == "pause":
            await self.feed.until(lambda: not self.checkpoints.failing or self._stopping or bool(self._lane_ended))
        if self._next_epoch > self._training.epochs and not (self._stopping or self.rollbacks.running):
            self.ending = "finished"

    async def keep_last(self, why: str) -> None:
        """Have a last checkpoint written, where any are, before the run leaves; not for longer than a while."""
        if self._keeps:
            with anyio.move_on_after(_LAST_CHECKPOINT_S), suppress(TolariaError):  # told by the desk
                await self.checkpoints.create(why)

    async def _end_lane(self) -> None:
        self._link.stop()
        while self._lane_ended is None:
            self._epoch_over = anyio.Event()
            await self._epoch_over.wait()
        self._raise_if_lane_failed()

    def _raise_if_lane_failed(self) -> None:
        if self._lane_ended is not None and self._lane_ended.error is not None:
            error = self._lane_ended.error
            raise LaneFailedError(f"{type(error).__name__}: {error}") from error

    # -- what the lane reports -----------------------------------------------------------------------------------

    def _take_all(self, reports: Sequence[Report]) -> None:
        for report in reports:
            self._take(report)
        self._recorder.frame_ends(self._link.snapshots())

    def _take(self, report: Report) -> None:
        match report:
            case StepReport():
                self._take_step(report)
            case EpochReport():
                self._epoch_report = report
                self._next_epoch = report.epoch + 1
                self._epoch_over.set()
            case SeedsReport():
                self._recorder.fence(report, wished=False)
                self._safeguards.rebuilt(report)
            case FenceReport():
                self._take_fence(report)
            case HeldReport():
                if self._link.standstill.answered(report.hold):
                    self._guardian.held()
                    self.feed.changed()
            case PointsLost():
                self._recorder.rollbacks.points_lost(report.reason)
            case ProfileEnded():
                self._profiles.take(report)
            case LaneEnded():
                self._lane_ended = report
                self._link.desk.close()
                self._profiles.close()
                self._epoch_over.set()
                self.feed.changed()
            case _:
                assert_never(report)

    def _take_fence(self, report: FenceReport) -> None:
        if isinstance(report.result, Restored):
            self._rewind(report.result)
        self._link.desk.take(report)

    def _take_step(self, step: StepReport) -> None:
        verdict = self._retreats.step(step, self._progress.health)
        healthy = isinstance(verdict, Proceed) and not self.rollbacks.running
        self._recorder.step(step, observed=healthy or step.void)
        self._safeguards.step(step)
        self._profiles.step(step)
        if healthy:
            self._retreats.observed(self._progress.health)
            self._cadence.step(step)
            self.rollbacks.step(step)
            self.checkpoints.stepped(step.global_step)
        if not isinstance(verdict, Proceed):
            self._recorder.unhealthy(step, verdict.reason)
            if not step.void:
                self._safeguards.failing(EXPLOSION)
            self._enact_verdict(verdict, before_step=step.global_step - (not step.void))
        elif not (self._holding.on_hold or self.rollbacks.running):
            held = judge(self._progress.health, void_steps_max=self._control.max_void_steps)
            if isinstance(held, Hold):
                self._holding.hold(held.reason)

    def _enact_verdict(self, verdict: Retreat | Halt, *, before_step: int) -> None:
        match verdict:
            case Retreat():
                self.rollbacks.retreat(verdict, target_step=before_step)
            case Halt(reason):
                self._guardian.rollbacks_spent(reason)
            case _:
                assert_never(verdict)

    def _rewind(self, restored: Restored) -> None:
        """The lane has gone back: so does what is known of it here."""
        self._recorder.rewound(restored)
        self.checkpoints.stepped(restored.position.global_step)
        self._next_epoch = restored.place.number + restored.place.over
        self._epoch_report = None
        if not restored.underway and restored.latest_order == self._link.order:
            self._epoch_over.set()  # nobody will report the epoch that is waited for: it has to be ordered anew
        self.feed.changed()

    # -- what the peers answer -----------------------------------------------------------------------------------

    def _settle(self, consultation: Consultation) -> None:
        """Take a settled consultation in, at the boundary or whenever it comes, unless it is too old to be meant."""
        age_steps = self._progress.global_step - consultation.state.global_step
        stale = age_steps > self._control.max_staleness_steps
        self._recorder.consultation(consultation, stale=stale)
        if consultation.failed:
            self._safeguards.failing(PEER_FAILURE)
        if not stale and not self._holding.ended:
            self._enactor.enact(consultation)
        self.feed.changed()

    # -- what operators ask --------------------------------------------------------------------------------------

    def status(self) -> GetStatusResponse:
        """The run's part of GetStatus."""
        status = status_message(self._progress, now_s=time.monotonic())
        status.rollbacks = self.rollbacks.completed
        self._guardian.tell(status)
        return status

    @property
    def global_step(self) -> int:
        """Updates done, as far as reported."""
        return self._progress.global_step

    async def pause(self, reason: str) -> None:
        """Hold the run; returns when the lane stands, between two microbatches.

        Raises:
            WrongStateError: when the run has ended or is ending.
        """
        self._holding.hold(reason)
        held = self._link.standstill.held
        await self.feed.until(
            lambda: held.is_set() or self._lane_ended is not None or self._progress.state != RUN_STATE_PAUSED
        )

    def resume(self, reason: str) -> None:
        """Go on from where the run was held; nothing to do when it runs.

        Raises:
            WrongStateError: when the run has ended or is ending, or while an emergency halts it.
        """
        self._holding.resume(reason)

    async def adjust_rate(self, request: AdjustLearningRateRequest) -> int:
        """Change learning rates at the next fence, as `Enactor.adjust` does. WrongStateError: the run has ended."""
        if self._holding.ended:
            raise WrongStateError("the run has ended: there is no rate to change")
        return await self._enactor.adjust(request)

    async def roll_back(self, asked: Asked) -> RollbackOutcome:
        """Go back, as `RollbackDesk.carry_out` does. WrongStateError: the run has ended."""
        if self._holding.ended:
            raise WrongStateError("the run has ended: there is nothing that could go back")
        return await self.rollbacks.carry_out(asked)

    async def checkpoint(self, reason: str) -> CheckpointRow:
        """Have one written, as `CheckpointDesk.create` does. WrongStateError: the run has ended."""
        if self._holding.ended:
            raise WrongStateError("the run has ended: its last checkpoint stands")
        return await self.checkpoints.create(reason)

    async def capture_profile(self, request_id: str, active_steps: int) -> ProfileTaken:
        """Take a profile, as `ProfileDesk.capture` does. WrongStateError: the run has ended."""
        if self._holding.ended:
            raise WrongStateError("the run has ended: there is no step to profile")
        return await self._profiles.capture(request_id, active_steps)

    async def stop(self, reason: str) -> None:
        """Finish the step and end the run; returns when it has ended. Raises WrongStateError when it had before."""
        after(self._progress.state, RunEvent.FINISHED)
        self.ending = "stopped"
        self._progress.state_reason = f"stopped: {reason}"
        if self._keeps:
            self._link.standstill.want(_LEAVING)
            await self.keep_last(f"stopped: {reason}")
        self._stop()
        await self.feed.until(lambda: self._holding.ended)

    async def keep_and_drain(self, within_s: float) -> None:
        """The process is about to end: keep the state, if that can be done in time, and end the run."""
        if self._keeps and not self._holding.ended:
            self._link.standstill.want(_LEAVING)
            with anyio.move_on_after(within_s):
                await self.keep_last("the service is stopping")
        self.drain()

    def drain(self) -> None:
        """Finish the step and end the run. Returns at once."""
        reason = self._progress.state_reason if self._holding.ended else "the service is stopping"
        self._holding.enter(RunEvent.DRAINING, reason)
        self._stop()

    def close(self, timeout_s: float) -> bool:
        """Make sure that the lane's thread ends, after `run` has; whether it did. Blocks, but for a moment."""
        return self._link.close(timeout_s)

    @property
    def _keeps(self) -> bool:
        """Whether there are checkpoints."""
        return bool(self._checkpointing.every_epochs or self._checkpointing.every_steps)

    def _stop(self) -> None:
        self._stopping = True
        self._link.stop()
