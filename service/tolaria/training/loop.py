"""The training loop as the event loop sees it: gives epochs to the lane, reads its reports, enacts verdicts.

Owns the run's state and its order of events. Never computes, never touches a tensor, never waits without a bound while
training stands.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import anyio
import structlog

from leyline.v1.admin_service_pb2 import (
    RUN_STATE_DRAINING,
    RUN_STATE_FAILED,
    RUN_STATE_FINISHED,
    RUN_STATE_HALTED,
    RUN_STATE_PAUSED,
    AdjustLearningRateRequest,
    GetStatusResponse,
)
from tolaria.config import ControlSettings, TrainingSettings
from tolaria.errors import LaneFailedError, WrongStateError
from tolaria.training.boundary import Boundary, BoundaryPolicy
from tolaria.training.cadence import StepCadence
from tolaria.training.consult import Consultant, Consultation
from tolaria.training.enact import Enactor
from tolaria.training.feed import StatusFeed
from tolaria.training.fence_desk import FenceDesk
from tolaria.training.fences import FenceReport
from tolaria.training.growth import SeedsReport
from tolaria.training.guardian import Guardian
from tolaria.training.judge import Hold, Proceed, judge
from tolaria.training.lane import Lane
from tolaria.training.packet import state_packet, status_message
from tolaria.training.record import Recorder
from tolaria.training.reports import EpochReport, HeldReport, LaneEnded, Report, ReportBox, StepReport
from tolaria.training.rig import Rig
from tolaria.training.run_state import RunEvent, after
from tolaria.training.safeguards import PEER_FAILURE


class TrainingLoop:
    """One run. `run` is the task; everything else answers operators and peers while it goes on.

    Args:
        rig: built already; goes to the lane.
        training: how long, how.
        control: budgets and bounds.
        patience_s: how long a deterministic boundary waits for the peers.
        recorder: writes progress, metrics and events.
        guardian: safeguards and emergencies; told to halt this run where one asks for it.
        feed: told of every change.
        make_consultant: given what to call with settled consultations, makes the one to ask.
    """

    def __init__(
        self,
        rig: Rig,
        *,
        training: TrainingSettings,
        control: ControlSettings,
        patience_s: float,
        recorder: Recorder,
        guardian: Guardian,
        feed: StatusFeed,
        make_consultant: Callable[[Callable[[Consultation], None]], Consultant],
    ) -> None:
        self._training = training
        self._control = control
        self._recorder = recorder
        self._progress = recorder.progress
        self._guardian, self._safeguards = guardian, guardian.safeguards
        self._log = structlog.get_logger()
        self.feed = feed
        self.consultant = make_consultant(self._settle)
        self._policy = BoundaryPolicy.of(control, patient=training.deterministic, patience_s=patience_s)
        self._boundary = Boundary(self.consultant, self._policy)
        self._cadence = StepCadence(self.consultant, self._progress, interval=control.step_interval)
        self._box = ReportBox(self._notify)
        self._lane = Lane(rig, self._box, threads=training.threads, hearts=guardian.hearts)
        self._desk = FenceDesk(self._lane.post)
        self._enactor = Enactor(self._desk, recorder, hold=self._hold, guardian=guardian, changed=feed.changed)
        recorder.fast_paths(rig.paths)
        recorder.rates(rig.growth.controller.learning_rates())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._epoch_report: EpochReport | None = None
        self._epoch_over = anyio.Event()
        self._held = anyio.Event()
        self._hold_number = 0
        self._lane_ended: LaneEnded | None = None
        self._stopping = False
        guardian.watch(self._halt)

    # -- the task ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Train all epochs, or until stopped. Ends in FINISHED, or in FAILED when the job's own code raised."""
        self._loop = asyncio.get_running_loop()
        self._lane.start()
        self._enter(RunEvent.STARTED, self._progress.state_reason)
        try:
            for epoch in range(1, self._training.epochs + 1):
                report = await self._run_epoch(epoch)
                if report is None:
                    break
                await self._cross_boundary(report)
            await self._end_lane()
        except LaneFailedError as error:
            self._log.error("training_failed", error=str(error), exc_info=error.__cause__)
            self._enter(RunEvent.FAILED, str(error))
        else:
            reason = self._progress.state_reason if self._stopping else "all epochs done"
            self._enter(RunEvent.FINISHED, reason)

    async def _run_epoch(self, epoch: int) -> EpochReport | None:
        """Let the lane run `epoch`; None when the run was stopped in it."""
        if self._stopping:
            return None
        self._epoch_over, self._epoch_report = anyio.Event(), None
        self._recorder.epoch_begins(epoch)
        self._lane.run_epoch(epoch)
        await self._epoch_over.wait()
        self._raise_if_lane_failed()
        return self._epoch_report

    async def _cross_boundary(self, report: EpochReport) -> None:
        self._recorder.epoch_ends(report, layers=not self._safeguards.mode.on)
        state = state_packet(self._progress, report, wall_ns=time.time_ns())
        await self._boundary.wait_for_answer(state, self._progress.refusals, since_s=report.finished_at_s)
        held_up_s = time.monotonic() - report.finished_at_s
        breach = self._recorder.boundary(report, held_up_s, self._policy.budget_s, binding=not self._policy.patient)
        self._guardian.epoch_over(breach=breach)
        self.feed.changed()

    async def _end_lane(self) -> None:
        self._lane.stop()
        while self._lane_ended is None:
            self._epoch_over = anyio.Event()
            await self._epoch_over.wait()
        self._raise_if_lane_failed()

    def _raise_if_lane_failed(self) -> None:
        if self._lane_ended is not None and self._lane_ended.error is not None:
            error = self._lane_ended.error
            raise LaneFailedError(f"{type(error).__name__}: {error}") from error

    # -- what the lane reports -----------------------------------------------------------------------------------

    def _notify(self) -> None:
        """Called from the lane's thread: let the event loop take the box's reports."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._take_reports)

    def _take_reports(self) -> None:
        reports = self._box.take()
        for report in reports:
            self._take(report)
        if reports:
            self._recorder.frame_ends()

    def _take(self, report: Report) -> None:
        match report:
            case StepReport():
                self._recorder.step(report)
                self._safeguards.step(report)
                self._cadence.step(report)
                self._enact(judge(self._progress.health, void_steps_max=self._control.max_void_steps))
            case EpochReport():
                self._epoch_report = report
                self._epoch_over.set()
            case SeedsReport():
                self._recorder.fence(report, wished=False)
                self._safeguards.rebuilt(report)
            case FenceReport():
                self._desk.take(report)
            case HeldReport():
                if report.hold == self._hold_number:
                    self._held.set()
                    self._guardian.held()
                    self.feed.changed()
            case LaneEnded():
                self._lane_ended = report
                self._desk.close()
                self._epoch_over.set()
                self.feed.changed()

    def _enact(self, verdict: Proceed | Hold) -> None:
        match verdict:
            case Proceed():
                pass
            case Hold(reason):
                if not self._on_hold:
                    self._hold(reason)

    # -- what the peers answer -----------------------------------------------------------------------------------

    def _settle(self, consultation: Consultation) -> None:
        """Take a settled consultation in, at the boundary or whenever it comes, unless it is too old to be meant."""
        age_steps = self._progress.global_step - consultation.state.global_step
        stale = age_steps > self._control.max_staleness_steps
        self._recorder.consultation(consultation, stale=stale)
        if consultation.failed:
            self._safeguards.failing(PEER_FAILURE)
        if not stale and not self._ended:
            self._enactor.enact(consultation)
        self.feed.changed()

    # -- what operators ask --------------------------------------------------------------------------------------

    def status(self) -> GetStatusResponse:
        """The run's part of GetStatus."""
        status = status_message(self._progress, now_s=time.monotonic())
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
        self._hold(reason)
        held = self._held
        await self.feed.until(
            lambda: held.is_set() or self._lane_ended is not None or self._progress.state != RUN_STATE_PAUSED
        )

    def resume(self, reason: str) -> None:
        """Go on from where the run was held; nothing to do when it runs.

        Raises:
            WrongStateError: when the run has ended or is ending, or while an emergency halts it.
        """
        if self._guardian.halting:
            raise WrongStateError("an emergency halts the run: clear it first")
        self._enter(RunEvent.RESUMED, reason)
        self._recorder.resumed()
        self._lane.release()

    async def adjust_rate(self, request: AdjustLearningRateRequest) -> int:
        """Change learning rates at the next fence, as `Enactor.adjust` does. WrongStateError: the run has ended."""
        if self._ended:
            raise WrongStateError("the run has ended: there is no rate to change")
        return await self._enactor.adjust(request)

    async def stop(self, reason: str) -> None:
        """Finish the step and end the run; returns when it has ended. Raises WrongStateError when it had before."""
        after(self._progress.state, RunEvent.FINISHED)
        self._progress.state_reason = f"stopped: {reason}"
        self._stop()
        await self.feed.until(lambda: self._ended)

    def drain(self) -> None:
        """The process is about to end: finish the step and end the run. Returns at once."""
        reason = self._progress.state_reason if self._ended else "the service is stopping"
        self._enter(RunEvent.DRAINING, reason)
        self._stop()

    def close(self, timeout_s: float) -> bool:
        """Make sure that the lane's thread ends, after `run` has; whether it did. Blocks, but for a moment."""
        self._lane.stop()
        self._box.close()
        return self._lane.join(timeout_s)

    @property
    def _ended(self) -> bool:
        return self._progress.state in {RUN_STATE_FINISHED, RUN_STATE_FAILED, RUN_STATE_DRAINING}

    @property
    def _on_hold(self) -> bool:
        return self._ended or self._progress.state in {RUN_STATE_PAUSED, RUN_STATE_HALTED}

    def _halt(self, reason: str) -> None:
        """Freeze training; a run that stands already, or has ended, says so at once."""
        if not self._ended:
            self._hold(reason, RunEvent.HALTED)
        if self._ended or self._held.is_set():
            self._guardian.held()

    def _hold(self, reason: str, event: RunEvent = RunEvent.PAUSED) -> None:
        if self._progress.state == RUN_STATE_HALTED:
            return  # by more than a pause
        was_held = self._progress.state == RUN_STATE_PAUSED
        self._enter(event, reason)
        if not was_held:
            self._held = anyio.Event()
            self._hold_number += 1
            self._lane.hold(self._hold_number)

    def _stop(self) -> None:
        self._stopping = True
        self._lane.stop()

    def _enter(self, event: RunEvent, reason: str) -> None:
        self._recorder.state(after(self._progress.state, event), reason)
        self.feed.changed()
