"""One run of training as the service and its operators see it: the task to serve, and what can be asked meanwhile.

Owns what each request does to the run. Never computes, never touches a tensor.
"""

from __future__ import annotations

import time

import anyio

from leyline.v1.admin_service_pb2 import AdjustLearningRateRequest, GetStatusResponse
from tolaria.errors import WrongStateError
from tolaria.journal.rows import CheckpointRow
from tolaria.rollback.orders import RollbackOutcome
from tolaria.training.course import Course
from tolaria.training.laps import Laps
from tolaria.training.packet import status_message
from tolaria.training.profile_desk import ProfileTaken
from tolaria.training.reception import Reception
from tolaria.training.recovery.rollbacks import Asked
from tolaria.training.recovery.startup import RunOutcome
from tolaria.training.run_state import RunEvent, after
from tolaria.training.ties import RunPlan, RunTies


class TrainingLoop:
    """One run. `run` is the task; everything else answers operators and peers while it goes on.

    `consultant`, `rollbacks` and `checkpoints` are served by somebody else, in tasks of their own.

    Args:
        ties: the run's parts, made for it alone.
        plan: how long it goes on by itself.
    """

    def __init__(self, ties: RunTies, plan: RunPlan) -> None:
        self._link = ties.link
        self._conduct = ties.conduct
        self._guardian = ties.guardian
        self._enactor = ties.enactor
        self._profiles = ties.profiles
        self._plan = plan
        self._progress = ties.recorder.progress
        self.feed = ties.feed
        self.rollbacks = ties.rollbacks
        self.checkpoints = ties.checkpoints
        self.consultant = ties.consultant
        ties.recorder.begin(ties.link.rig)
        self._laps = Laps(ties.link.rig.epoch)
        reception = Reception(ties, self._laps, void_steps_max=plan.void_steps_max)
        self._course = Course(ties, plan, self._laps, reception)
        ties.guardian.watch(ties.conduct.halt, ties.rollbacks.go_back_if_calm)

    @property
    def ending(self) -> RunOutcome:
        """How the run leaves this process, once it has ended."""
        return self._course.ending

    @property
    def global_step(self) -> int:
        """Updates done, as far as reported."""
        return self._progress.global_step

    async def run(self) -> None:
        """Train all epochs, or until stopped. Ends in FINISHED, or in FAILED when the job's own code raised."""
        await self._course.run()

    def status(self) -> GetStatusResponse:
        """The run's part of GetStatus."""
        status = status_message(self._progress, now_s=time.monotonic())
        status.rollbacks = self.rollbacks.completed
        self._guardian.tell(status)
        return status

    async def pause(self, reason: str) -> None:
        """Hold the run; returns when the lane stands, between two microbatches.

        Raises:
            WrongStateError: when the run has ended or is ending.
        """
        self._conduct.hold(reason)
        held = self._link.standstill.held
        await self.feed.until(lambda: held.is_set() or self._laps.lane_ended or not self._conduct.paused)

    def resume(self, reason: str) -> None:
        """Go on from where the run was held; nothing to do when it runs.

        Raises:
            WrongStateError: when the run has ended or is ending, or while an emergency halts it.
        """
        self._conduct.resume(reason)

    async def adjust_rate(self, request: AdjustLearningRateRequest) -> int:
        """Change learning rates at the next fence, as `Enactor.adjust` does. WrongStateError: the run has ended."""
        self._conduct.require_unended("there is no rate to change")
        return await self._enactor.adjust(request)

    async def roll_back(self, asked: Asked) -> RollbackOutcome:
        """Go back, as `RollbackDesk.carry_out` does. WrongStateError: the run has ended."""
        self._conduct.require_unended("there is nothing that could go back")
        return await self.rollbacks.carry_out(asked)

    async def checkpoint(self, reason: str) -> CheckpointRow:
        """Have one written, as `CheckpointDesk.create` does.

        Raises:
            WrongStateError: the run has ended, or its state is not what a rollback should have brought back.
        """
        self._conduct.require_unended("its last checkpoint stands")
        if self.rollbacks.unproven:
            raise WrongStateError("the live state is not what was rolled back to: roll back once more first")
        return await self.checkpoints.create(reason)

    async def capture_profile(self, request_id: str, active_steps: int) -> ProfileTaken:
        """Take a profile, as `ProfileDesk.capture` does. WrongStateError: the run has ended."""
        self._conduct.require_unended("there is no step to profile")
        return await self._profiles.capture(request_id, active_steps)

    async def stop(self, reason: str) -> None:
        """Finish the step and end the run; returns when it has ended, and it ends also when whoever asked goes away.

        Raises:
            WrongStateError: when it had ended before.
        """
        after(self._progress.state, RunEvent.FINISHED)
        self._course.ending = "stopped"
        self._progress.state_reason = f"stopped: {reason}"
        try:
            if self._plan.keeps:
                self._conduct.leave()
                await self._course.keep_last(f"stopped: {reason}")
        finally:  # whoever asked may go away meanwhile: the lane, which stands for good by now, ends all the same
            self._course.stop()
        await self.feed.until(lambda: self._conduct.ended)

    async def keep_and_drain(self, within_s: float) -> None:
        """The process is about to end: keep the state, if that can be done in time, and end the run."""
        try:
            if self._plan.keeps and not self._conduct.ended:
                self._conduct.leave()
                with anyio.move_on_after(within_s):
                    await self._course.keep_last("the service is stopping")
        finally:
            self.drain()

    def drain(self) -> None:
        """Finish the step and end the run. Returns at once."""
        reason = self._progress.state_reason if self._conduct.ended else "the service is stopping"
        self._conduct.enter(RunEvent.DRAINING, reason)
        self._course.stop()

    def close(self, timeout_s: float) -> bool:
        """Make sure that the lane's thread ends, after `run` has; whether it did. Blocks, but for a moment."""
        return self._link.close(timeout_s)
