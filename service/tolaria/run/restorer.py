"""How a rollback's restore point is found and restored by the lane."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import anyio.to_thread

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, ROLLBACK_TIER_UNSPECIFIED
from tolaria.checkpoint.store import CheckpointStore, LoadedCheckpoint
from tolaria.errors import LaneError, NoCheckpointError, TolariaError
from tolaria.journal.rows import CheckpointRow
from tolaria.lane import messages
from tolaria.rollback.protocol import Rollback, tier_name
from tolaria.run.checkpointing import Checkpointing
from tolaria.run.lane_client import LaneClient
from tolaria.run.observers import RunObserver
from tolaria.run.restore_points import RestorePoint, RestorePoints, choose
from tolaria.run.status import RunStatus


class LaneRestorer:
    """Finds restore points and has the lane restore them: the run's `Restorer`. Used on the event loop only.

    Attributes:
        lane: the lane's client.
        status: the figures of the run.
        points: which restore points are proven or suspect.
        origin: the checkpoint that is being restored if it is not an ancestor of the live state.
    """

    def __init__(
        self,
        lane: LaneClient,
        status: RunStatus,
        store: CheckpointStore,
        observers: RunObserver,
        *,
        points: RestorePoints,
        checkpointing: Checkpointing,
    ) -> None:
        self.lane = lane
        self.status = status
        self._store = store
        self._observers = observers
        self.points = points
        self.checkpointing = checkpointing
        self.origin: CheckpointRow | None = None
        self._candidates: tuple[CheckpointRow, ...] = ()
        self._submitted: asyncio.Future[messages.CommandDone] | None = None
        self._forbidden = False

    async def choose(self, rollback: Rollback, /) -> None:
        """Sets `tier`, `chosen_step` and `chosen`. Raises NoCheckpointError if there is no such restore point."""
        rows: tuple[CheckpointRow, ...] = ()
        if rollback.tier != ROLLBACK_TIER_FAST:
            rows = await anyio.to_thread.run_sync(self._store.kept_points, abandon_on_cancel=True)
        snapshots = () if rollback.tier == ROLLBACK_TIER_FULL else self.status.snapshots
        points = self.points.of(snapshots, rows)
        choice = choose(points, rollback)
        if choice is None:
            raise NoCheckpointError(nothing_for(rollback, points))
        self._candidates = choice.checkpoints
        rollback.tier, rollback.chosen_step = choice.point.tier, choice.point.global_step
        rollback.chosen = str(choice)

    async def reach_boundary(self) -> None:
        """Returns when the lane is at a step boundary. Raises LaneStoppedError if it ends first."""
        await self.lane.reach_boundary()

    async def keep(self, rollback: Rollback, /) -> None:
        """Sets `left_step`; saves the live state if it is to be, and sets `left_checkpoint_id` or `left_not_kept`."""
        rollback.left_step = self.status.global_step
        if not rollback.saves_left:
            return
        try:
            row, made = await self.checkpointing.keep()
        except TolariaError as error:
            rollback.left_not_kept = str(error)
        else:
            settings = self.checkpointing.settings
            rollback.left_checkpoint_id, rollback.superseded_kept = row.checkpoint_id, settings.keep_superseded
            rollback.left_kept_until_ns = time.time_ns() + int(settings.keep_superseded_s * 1e9)
            rollback.made_checkpoint_id = row.checkpoint_id if made else ""

    async def restore(self, rollback: Rollback, /) -> None:
        """Restores the target at the next step boundary and sets the restored fields of `rollback`.

        Raises:
            TolariaError: nothing was restored; the live state is unchanged.
        """
        self._submitted, self._forbidden, self.origin = None, False, None
        if rollback.tier == ROLLBACK_TIER_FAST:
            restored = await self._restore(rollback)
        else:
            loaded = await self._load(rollback)
            if not self.points.lineage.includes(loaded.row.attempt, loaded.row.global_step):
                self.origin = loaded.row
            try:
                image_id = await anyio.to_thread.run_sync(self.lane.images.put, loaded.image)  # may copy it
            except MemoryError as error:
                raise NoCheckpointError(f"no memory for the image of the checkpoint: {error}") from error
            try:
                restored = await self._restore(rollback, image_id)
            finally:
                self.lane.images.discard(image_id)
        rollback.restored_step = restored.position.global_step
        rollback.state_digest, rollback.expected_digest = restored.state_digest, restored.expected_digest
        rollback.restore_ms = restored.restore_ms

    def forbid(self, rollback: Rollback, /) -> bool:  # noqa: ARG002 - one rollback runs at a time
        """Forbids the restore to change live state; returns False when the change has already begun."""
        self._forbidden = True
        return self._submitted is None or self.lane.forbid_restore(self._submitted)

    async def _restore(self, rollback: Rollback, image_id: int = 0) -> messages.Restored:
        command = messages.Restore(
            rollback.destination, rollback.deadline_s, image_id, other_branch=self.origin is not None
        )
        self._submitted = self.lane.submit(command)
        done = await self._submitted
        if done.failure is not None:
            raise done.failure.error()
        if not isinstance(done.result, messages.Restored):
            raise LaneError(f"the lane answered a restore with {type(done.result).__name__}")
        return done.result

    async def _load(self, rollback: Rollback) -> LoadedCheckpoint:
        def expired() -> bool:
            return self._forbidden or time.monotonic() >= rollback.deadline_s

        candidates = self._candidates
        loaded = await anyio.to_thread.run_sync(
            lambda: self._store.load_first(candidates, expired), abandon_on_cancel=True
        )
        for damage in loaded.damaged:
            self._observers.on_checkpoint_damaged(rollback.rollback_id, damage)
        return loaded


def nothing_for(rollback: Rollback, points: Sequence[RestorePoint]) -> str:
    """Returns why there is none among the restore points for a rollback."""
    if rollback.checkpoint_id:
        return f"nothing to go back to: there is no checkpoint {rollback.checkpoint_id}; it may have been removed"
    tier = "" if rollback.tier == ROLLBACK_TIER_UNSPECIFIED else f" of the {tier_name(rollback.tier)} tier"
    kind = "proven " if rollback.automatic else "" if rollback.target_step is not None else "sound "
    target = "" if rollback.target_step is None else f" at or before step {rollback.target_step}"
    before = "" if rollback.before_step is None else f"{' and' if target else ''} before step {rollback.before_step}"
    live = [point.global_step for point in points if not point.superseded]
    oldest = f"; the oldest of all is of step {min(live)}" if live else ""
    return f"nothing to go back to: no {kind}restore point{tier}{target}{before}{oldest}{_superseded(rollback, points)}"


def _superseded(rollback: Rollback, points: Sequence[RestorePoint]) -> str:
    """Returns which superseded checkpoint there is at or before the target step of an operator's rollback, if any."""
    step = rollback.target_step
    if step is None or rollback.automatic:
        return ""
    rows = [point for point in points if point.superseded and point.checkpoint and point.global_step <= step]
    newest = max(rows, key=lambda point: point.age_key, default=None)
    if newest is None or newest.checkpoint is None:
        return ""
    return f"; a superseded one is of step {newest.global_step}: checkpoint {newest.checkpoint.checkpoint_id}"
