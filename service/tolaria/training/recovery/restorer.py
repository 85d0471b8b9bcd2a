"""The coordinator's way to the lane: finds points to go back to, fetches them from disk, has the lane copy them.

Runs on the event loop; reading happens in a thread. Must not know why there is a rollback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import anyio.to_thread

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, RollbackTier
from tolaria.checkpoint.store import Damage, LoadedCheckpoint
from tolaria.errors import LaneError
from tolaria.images.image import SnapshotInfo, StateImage
from tolaria.journal.rows import CheckpointRow
from tolaria.rollback.orders import RestoreOrder, RestoreOutcome
from tolaria.training.fence_desk import FenceDesk
from tolaria.training.fences import Restore
from tolaria.training.recovery.keeper import Restored


class Checkpoints(Protocol):
    """The durable points; called in a thread."""

    def restore_points(self) -> tuple[CheckpointRow, ...]:
        """The committed ones, oldest first."""
        ...

    def load_newest(self, expired: Callable[[], bool], *, at_or_before: int | None = None) -> LoadedCheckpoint:
        """The nearest that is whole."""
        ...


class LaneRestorer:
    """`Restorer` of one run.

    Args:
        desk: where the lane is asked.
        points: the snapshots in memory.
        checkpoints: those on disk.
        damaged: told, by rollback_id, of every checkpoint that could not be loaded.
    """

    def __init__(
        self,
        desk: FenceDesk,
        *,
        points: Callable[[], tuple[SnapshotInfo, ...]],
        checkpoints: Checkpoints,
        damaged: Callable[[str, Damage], None],
    ) -> None:
        self._desk = desk
        self._points = points
        self._checkpoints = checkpoints
        self._damaged = damaged

    async def locate(self, tier: RollbackTier.ValueType, at_or_before: int | None, /) -> int | None:
        """The step of the tier's nearest point; None: it has none."""
        if tier == ROLLBACK_TIER_FAST:
            steps = [info.position.global_step for info in self._points()]
        else:
            rows = await anyio.to_thread.run_sync(self._checkpoints.restore_points, abandon_on_cancel=True)
            steps = [row.global_step for row in rows]
        return max((step for step in steps if at_or_before is None or step <= at_or_before), default=None)

    async def restore(self, order: RestoreOrder, /) -> RestoreOutcome:
        """Bring it back at the next fence.

        Raises:
            TolariaError: it could not be; the live state is as it was.
        """
        image = None if order.tier == ROLLBACK_TIER_FAST else await self._loaded(order)
        report = await self._desk.carry_out(Restore(order, image))
        restored = report.result
        if not isinstance(restored, Restored):
            raise LaneError(f"the lane answered a restore with a {type(restored).__name__}")
        return RestoreOutcome(
            restored.position.global_step, restored.state_digest, restored.expected_digest, restored.latency_ms
        )

    async def _loaded(self, order: RestoreOrder) -> StateImage:
        def load() -> LoadedCheckpoint:
            return self._checkpoints.load_newest(order.expired, at_or_before=order.target_step)

        loaded = await anyio.to_thread.run_sync(load, abandon_on_cancel=True)
        for damage in loaded.damaged:
            self._damaged(order.rollback_id, damage)
        return loaded.image
