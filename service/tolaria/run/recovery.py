"""Rollbacks of a run: how they begin, how the state is found and restored, and what follows before training goes on.

The lane is held from the request until spoiled batches are skipped, the learning rate is cut and later checkpoints are
superseded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import anyio
import anyio.to_thread
import structlog

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, ROLLBACK_TIER_UNSPECIFIED, RollbackTier
from tolaria.checkpoint.store import CheckpointStore
from tolaria.emergency import Trigger
from tolaria.errors import LaneError, TolariaError, WrongStateError
from tolaria.images import StateImage
from tolaria.lane import messages
from tolaria.rollback.coordinator import RollbackCoordinator
from tolaria.rollback.protocol import Ending, Rollback
from tolaria.run.checkpointing import Checkpointing
from tolaria.run.health import Health, Retreat
from tolaria.run.lane_client import LaneClient
from tolaria.run.observers import RunObserver
from tolaria.run.run_state import Lifecycle
from tolaria.run.safety import Safety
from tolaria.run.status import RunStatus
from tolaria.values.optimization import Adjustment

_ROLLBACK: Final = "rollback"  # holder of the lane, and origin of a cut of the learning rate
_JUDGE: Final = "judge"
FOLLOW_UP_S: Final = 5.0
"""Longest wait of each command after a restore for the lane, which is already held."""

_BATCHES_LOGGED_MAX: Final = 20


class LaneRestorer:
    """Finds restore points and has the lane restore them: the run's `Restorer`. Used on the event loop only."""

    def __init__(self, lane: LaneClient, status: RunStatus, store: CheckpointStore, observers: RunObserver) -> None:
        self._lane = lane
        self._status = status
        self._store = store
        self._observers = observers
        self._submitted: asyncio.Future[messages.CommandDone] | None = None
        self._forbidden = False

    async def locate(self, tier: RollbackTier.ValueType, at_or_before: int | None, /) -> int | None:
        """Returns the step of the tier's nearest restore point; None if there is none. Raises JournalError."""
        if tier == ROLLBACK_TIER_FAST:
            steps = [info.position.global_step for info in self._status.snapshots]
        else:
            rows = await anyio.to_thread.run_sync(self._store.restore_points, abandon_on_cancel=True)
            steps = [row.global_step for row in rows]
        return max((step for step in steps if at_or_before is None or step <= at_or_before), default=None)

    async def restore(self, rollback: Rollback, /) -> None:
        """Restores the target at the next step boundary and sets the restored fields of `rollback`.

        Raises:
            TolariaError: nothing was restored; the live state is unchanged.
        """
        self._submitted, self._forbidden = None, False
        if rollback.tier == ROLLBACK_TIER_FAST:
            restored = await self._restore(rollback)
        else:
            image_id = self._lane.images.put(await self._load(rollback))
            try:
                restored = await self._restore(rollback, image_id)
            finally:
                self._lane.images.discard(image_id)
        rollback.restored_step = restored.position.global_step
        rollback.state_digest, rollback.expected_digest = restored.state_digest, restored.expected_digest
        rollback.restore_ms = restored.restore_ms

    def forbid(self, rollback: Rollback, /) -> bool:  # noqa: ARG002 - one rollback runs at a time
        """Forbids the restore to change live state; returns False when the change has already begun."""
        self._forbidden = True
        return self._submitted is None or self._lane.forbid_restore(self._submitted)

    async def _restore(self, rollback: Rollback, image_id: int = 0) -> messages.Restored:
        self._submitted = self._lane.submit(messages.Restore(rollback.destination, rollback.deadline_s, image_id))
        done = await self._submitted
        if done.failure is not None:
            raise done.failure.error()
        if not isinstance(done.result, messages.Restored):
            raise LaneError(f"the lane answered a restore with {type(done.result).__name__}")
        return done.result

    async def _load(self, rollback: Rollback) -> StateImage:
        def expired() -> bool:
            return self._forbidden or time.monotonic() >= rollback.deadline_s

        loaded = await anyio.to_thread.run_sync(
            lambda: self._store.load_newest(expired, at_or_before=rollback.target_step), abandon_on_cancel=True
        )
        for damage in loaded.damaged:
            self._observers.on_checkpoint_damaged(rollback.rollback_id, damage)
        return loaded.image


class Recovery:
    """Carries out rollbacks, one at a time, in the task `serve`. Used on the event loop only.

    `safety` receives missed deadlines and failed proofs while the lane is still held.
    """

    def __init__(
        self,
        coordinator: RollbackCoordinator,
        lane: LaneClient,
        *,
        lifecycle: Lifecycle,
        health: Health,
        checkpointing: Checkpointing,
        observers: RunObserver,
        safety: Safety,
        status: RunStatus,
    ) -> None:
        self._coordinator = coordinator
        self._lane = lane
        self._lifecycle = lifecycle
        self._health = health
        self._checkpointing = checkpointing
        self._observers = observers
        self._safety = safety
        self._status = status
        self._log = structlog.get_logger()
        self._wake = anyio.Event()
        self._current: tuple[Rollback, Callable[[Rollback], None]] | None = None
        self._over = anyio.Event()
        self._recovering: Rollback | None = None
        self.unproven = False
        """Whether a failed restore has left the live state corrupt, so that it must be neither trained nor saved."""

    @property
    def running(self) -> bool:
        """Whether a rollback is under way."""
        return self._current is not None

    async def serve(self) -> None:
        """Carries out rollbacks as they are begun, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            if self._current is not None:
                await self._carry_out(*self._current)

    def begin(self, rollback: Rollback, on_over: Callable[[Rollback], None] = lambda _rollback: None) -> None:
        """Begins a rollback and holds the lane; `on_over` is called when it has ended.

        Without a target step it goes to the newest healthy restore point.

        Raises:
            WrongStateError: another rollback is under way, or the run has ended.
        """
        self._lifecycle.require_not_ended("there is nothing to roll back")
        if self._current is not None:
            raise WrongStateError("another rollback is running")
        if rollback.target_step is None:
            rollback.target_step = self._health.healthy_step
        rollback.global_step = self._status.global_step
        self._stop_awaiting_step()
        self._current, self._over = (rollback, on_over), anyio.Event()
        self._lane.hold(_ROLLBACK)
        self._observers.on_rollback_started(rollback)
        self._wake.set()

    async def roll_back(self, rollback: Rollback) -> Rollback:
        """Begins a rollback, waits for its end and returns it; it continues even if the caller is cancelled.

        Raises:
            RestoreUnprovenError: the live state was overwritten and is not what was captured; the run is halted.
            TolariaError: nothing was restored; the live state is unchanged. WrongStateError as for `begin`.
        """
        self.begin(rollback)
        await self._over.wait()
        if rollback.ending is not Ending.RESTORED:
            raise rollback.error or WrongStateError("the rollback was aborted")
        return rollback

    def retreat(self, verdict: Retreat) -> None:
        """Begins the rollback that a health verdict requires, unless one is in progress or the run has ended."""
        if self.running or self._lifecycle.ended:
            return
        # If there is no snapshot in memory, a checkpoint is used instead.
        tier = ROLLBACK_TIER_FULL if verdict.durable else ROLLBACK_TIER_UNSPECIFIED
        rollback = Rollback(tier, verdict.at_or_before, verdict.reason, _JUDGE)
        rollback.lr_cut = Adjustment(
            group=None,
            factor=verdict.cut.factor,
            value=None,
            expires_after_steps=verdict.cut.steps,
            origin=_ROLLBACK,
            request_id=rollback.rollback_id,
            reason="training went wrong at the previous learning rate",
        )
        self.begin(rollback)

    def on_step(self, step: messages.StepDone) -> None:
        """Handles a healthy step: the first one that is not skipped ends the recovery from a rollback."""
        if (rollback := self._recovering) is not None and not step.skipped:
            self._recovering = None
            duration_s = step.finished_at_s - rollback.began_s  # both monotonic; events arrive a little later
            self._observers.on_rollback_recovered(rollback, duration_s, step.global_step)

    async def _carry_out(self, rollback: Rollback, on_over: Callable[[Rollback], None]) -> None:
        try:
            await self._coordinator.run(rollback)
            await self._follow_up(rollback)
        finally:
            self._health.end_retreat()
            self._current = None
            self._lane.release(_ROLLBACK)
            self._over.set()
        on_over(rollback)
        self._lifecycle.changed()

    async def _follow_up(self, rollback: Rollback) -> None:
        """Does what has to be done before the lane is released, depending on how the rollback ended."""
        restored = rollback.ending is Ending.RESTORED
        self.unproven = rollback.unproven or (self.unproven and not restored)
        if rollback.unproven:
            self._safety.halt(f"rollback_unproven: {rollback.error}")
        elif not restored and rollback.origin == _JUDGE:  # the state that was to be undone is ill
            self._safety.trigger(Trigger.ROLLBACK_DEADLINE_MISSED, rollback.reason)
        self._observers.on_rollback_ended(rollback)
        if restored:
            await self._follow_restore(rollback)
        if restored or rollback.unproven:
            await self._checkpointing.supersede_after(rollback.restored_step)

    async def _follow_restore(self, rollback: Rollback) -> None:
        self._status.rollbacks += 1
        self._recovering = rollback
        if self._lane.held_for_others(_ROLLBACK):
            self._stop_awaiting_step()
        if spoiled := self._health.end_retreat():
            done = await self._call(messages.SkipBatches(spoiled))
            if done is not None and isinstance(done.result, messages.BatchesSkipped):
                self._log.warning(
                    "batches_left_out",
                    rollback_id=rollback.rollback_id,
                    epochs_and_places=sorted(spoiled)[:_BATCHES_LOGGED_MAX],
                    count=len(spoiled),
                    count_in_all=done.result.count,
                )
        if rollback.lr_cut is not None:
            await self._call(messages.ChangeOptimizer(rollback.lr_cut, {}, None))

    def _stop_awaiting_step(self) -> None:
        """Takes the last rollback to have ended when its state was restored, since no step follows soon."""
        rollback, self._recovering = self._recovering, None
        if rollback is not None and rollback.ending is not None:
            self._observers.on_rollback_duration(rollback.tier, rollback.ending.value, rollback.latency_ms / 1000)

    async def _call(self, command: messages.BoundaryCommand) -> messages.CommandDone | None:
        """Has the lane carry out a command; a failure is logged, because the state has been restored already."""
        error = "the lane did not answer"
        try:
            with anyio.move_on_after(FOLLOW_UP_S):
                return await self._lane.call(command)
        except TolariaError as failure:
            error = str(failure)
        self._log.error("after_rollback_failed", command=type(command).__name__, error=error)
        return None
