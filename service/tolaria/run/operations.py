"""What operators can ask of a run, other than to end it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from leyline.v1.admin_service_pb2 import GetStatusResponse
from tolaria.errors import WrongStateError
from tolaria.journal.rows import CheckpointRow
from tolaria.rollback.protocol import Rollback
from tolaria.run.adjustments import RunAdjustments
from tolaria.run.boundary import EpochBoundary, StepQuestions
from tolaria.run.checkpointing import Checkpointing
from tolaria.run.conditions import health_of
from tolaria.run.data_skips import DataSkip, DataSkips
from tolaria.run.health import Health
from tolaria.run.lane_client import LaneClient
from tolaria.run.observers import RunObserver
from tolaria.run.profiling import Profiles, ProfileTaken
from tolaria.run.recovery import Recovery
from tolaria.run.restore_points import RestorePoints
from tolaria.run.revival import Revival
from tolaria.run.run_state import Lifecycle
from tolaria.run.safety import Safety
from tolaria.run.status import RunStatus, status_message
from tolaria.values.optimization import Adjustment
from tolaria.values.training import BatchRange


@dataclass(frozen=True, slots=True)
class RunParts:
    """The collaborators of one run."""

    lane: LaneClient
    status: RunStatus
    observers: RunObserver
    health: Health
    lifecycle: Lifecycle
    safety: Safety
    recovery: Recovery
    revival: Revival
    checkpointing: Checkpointing
    boundary: EpochBoundary
    questions: StepQuestions
    points: RestorePoints
    profiles: Profiles
    adjustments: RunAdjustments
    skips: DataSkips


class RunOperations:
    """The base class of `TrainingRun`: its parts, and requests that need nothing else. Used on the event loop only."""

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts
        self._lane, self._status = parts.lane, parts.status
        self._observers, self._lifecycle = parts.observers, parts.lifecycle

    def status(self) -> GetStatusResponse:
        """Returns the run's part of GetStatus."""
        parts, message = self._parts, status_message(self._status, now_s=time.monotonic())
        parts.safety.add_to(message)
        conditions = parts.safety.conditions(
            checkpoints_failing=parts.checkpointing.failing, skipped_streak=parts.health.skip_streak
        )
        message.health.CopyFrom(health_of(self._status, conditions))
        return message

    async def pause(self, reason: str) -> None:
        """Pauses the run; returns when the lane is held. Raises WrongStateError when the run has ended or is ending."""
        self._lifecycle.hold(reason)
        lane = self._lane
        await self._status.feed.until(lambda: lane.is_held or lane.ended is not None or not self._lifecycle.paused)

    async def resume(self, reason: str) -> None:
        """Resumes a held run, which leaves an ill state first, as `Recovery.leave_ill_state` does.

        Raises WrongStateError when the run has ended or is ending, or an emergency halts it.
        """
        if self._parts.safety.halting:
            raise WrongStateError("an emergency halts the run: clear it first")
        self._lifecycle.resume(await self._parts.recovery.leave_ill_state(reason))

    def require_adjustable(self) -> None:
        """Raises WrongStateError when the run has ended, so that no learning rate can be adjusted."""
        self._lifecycle.require_not_ended("there is no rate to change")

    async def adjust_learning_rate(self, adjustment: Adjustment) -> int:
        """Adjusts learning rates, as `RunAdjustments.make` does. Raises WrongStateError when the run has ended."""
        self.require_adjustable()
        return await self._parts.adjustments.make(adjustment)

    async def roll_back(self, rollback: Rollback) -> Rollback:
        """Rolls back, as `Recovery.roll_back` does."""
        return await self._parts.recovery.roll_back(rollback)

    async def checkpoint(self, reason: str) -> CheckpointRow:
        """Writes a checkpoint, as `Checkpointing.create` does.

        Raises WrongStateError when the run has ended, or its live state is not what a rollback should have restored.
        """
        self._lifecycle.require_not_ended("no further checkpoint can be written")
        if unsound := self._parts.recovery.unsound:
            raise WrongStateError(unsound)
        return await self._parts.checkpointing.create(reason)

    async def skip_data(
        self, skip_id: str, reason: str, ranges: tuple[BatchRange, ...], steps: tuple[int, int] | None = None
    ) -> DataSkip:
        """Leaves batches out, as `DataSkips.add` does. Raises WrongStateError when the run has ended."""
        self._lifecycle.require_not_ended("there is no batch to leave out")
        return await self._parts.skips.add(skip_id, reason, ranges, steps)

    async def stop_skipping(self, skip_id: str) -> DataSkip:
        """Undoes a skip, as `DataSkips.remove` does. Raises WrongStateError when the run has ended."""
        self._lifecycle.require_not_ended("there is no batch to train on again")
        return await self._parts.skips.remove(skip_id)

    @property
    def skips(self) -> DataSkips:
        """The data that operators have training leave out."""
        return self._parts.skips

    async def capture_profile(self, active_steps: int, rank: int = 0) -> ProfileTaken:
        """Takes a profile, as `Profiles.capture` does. Raises WrongStateError when the run has ended."""
        self._lifecycle.require_not_ended("there is no step to profile")
        return await self._parts.profiles.capture(active_steps, rank)
