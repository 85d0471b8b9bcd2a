"""The lane's part in going back: takes snapshots as often as they may cost, keeps images for checkpoints, restores.

Owns the ring, and what has to follow a restore in the rig. Every method is called from the lane's thread, but for
`points` and `statistics`. Must not know who asked.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FULL
from leyline.v1.seeds_pb2 import SeedState
from tolaria.checkpoint.writer import TASKS_MAX
from tolaria.config import RollbackSettings
from tolaria.errors import NoCheckpointError, RestoreAbandonedError, StateMismatchError, StateUnsupportedError
from tolaria.images.image import SnapshotInfo, SnapshotStatistics, StateImage
from tolaria.images.pool import Lease
from tolaria.rollback.orders import RestoreOrder
from tolaria.state.restore import stage_restore
from tolaria.state.snapshots import Cadence, Captured, Declined, DeclineReason, SnapshotRing
from tolaria.training.place import EpochPlace
from tolaria.training.recovery.live import GrownStructure, training_state
from tolaria.training.rig import Rig
from tolaria.values.optimization import ActiveAdjustment
from tolaria.values.training import Position

_MIB = 2**20
_NO_LIMIT_BYTES = 2**62


@dataclass(frozen=True, slots=True)
class Kept:
    """An image of the state at a fence; the lease is the taker's."""

    position: Position
    lease: Lease


@dataclass(frozen=True, slots=True)
class Restored:
    """The live state is what was captured at `position`. Digests as `RestoreOutcome` has them; `latency_ms` likewise.

    `place` is where the epoch is. `underway`: the lane goes on with that epoch by itself; `latest_order` is the last
    order for an epoch that it knows of.
    """

    position: Position
    state_digest: str
    expected_digest: str
    latency_ms: float
    place: EpochPlace
    seeds: tuple[SeedState, ...]
    learning_rates: Mapping[str, float]
    adjustments: tuple[ActiveAdjustment, ...]
    underway: bool = False
    latest_order: int = 0


@dataclass(frozen=True, slots=True)
class PointsLost:
    """There can be no more points to go back to, and why."""

    reason: str


class SnapshotKeeper:
    """Keeps the states of one rig.

    Args:
        rig: the lane's.
        settings: memory and cadence.

    Raises:
        StateUnsupportedError: the model keeps state that has no faithful form.
    """

    def __init__(self, rig: Rig, settings: RollbackSettings) -> None:
        self._rig = rig
        self._every_steps = settings.every_steps
        self._structure = GrownStructure(rig.growth)
        self._state = training_state(rig, self._structure)
        self._ring = SnapshotRing(bytes_max=settings.memory_mb * _MIB, entries_max=settings.snapshots_max, seal=True)
        # For checkpoints of states that the ring has no room for; its memory is had when first needed.
        self._spare = SnapshotRing(bytes_max=_NO_LIMIT_BYTES, entries_max=TASKS_MAX, seal=False)
        self._cadence = Cadence(overhead_max=settings.overhead_max)
        self._lost = False

    # -- from the event loop -------------------------------------------------------------------------------------

    def points(self) -> tuple[SnapshotInfo, ...]:
        """The snapshots that can be restored, oldest first."""
        return self._ring.snapshots()

    def statistics(self) -> SnapshotStatistics:
        """Of the ring."""
        return self._ring.statistics()

    def resume(self, image: StateImage) -> Restored:
        """Bring back an earlier process's image, before the lane runs.

        Raises:
            RollbackError, SeedError, OptimizationError: it does not fit; everything is as it was.
        """
        step = image.position.global_step
        order = RestoreOrder("resume", ROLLBACK_TIER_FULL, step, 0.0, lambda: False, lambda: False)
        return self._restore(order, image, verify=False)

    # -- in the lane ---------------------------------------------------------------------------------------------

    def epoch_begins(self) -> PointsLost | None:
        """Take the first snapshot: there shall be somewhere to go back to from the first step on."""
        return self._capture() if not self._ring.statistics().snapshots else None

    def step_done(self, duration_s: float) -> PointsLost | None:
        """A step is done; take a snapshot if one is due."""
        self._cadence = self._cadence.after_step(duration_s)
        due = self._cadence.steps_since >= self._every_steps if self._every_steps else self._cadence.due
        return self._capture() if due else None

    def keep(self) -> Kept:
        """An image of the state as it is now, for somebody who needs time with it.

        Raises:
            StateUnsupportedError: something in the state has no faithful form.
            NoCheckpointError: both spare images are still being read.
        """
        for ring in (self._ring, self._spare):
            taken = ring.capture(self._state)
            if isinstance(taken, Captured) and (lease := ring.hold(taken.position.global_step)) is not None:
                return Kept(taken.position, lease)
        raise NoCheckpointError("every image that there is room for is still being written")

    def restore(self, order: RestoreOrder, image: StateImage | None) -> Restored:
        """Bring back a checkpoint's `image`, or, with None, the snapshot of the order's step.

        Raises:
            RestoreAbandonedError: the order says so.
            RollbackError: it cannot be; everything is as it was.
        """
        if order.expired():  # it may have waited long for its fence
            raise RestoreAbandonedError("waiting for its fence")
        if image is not None:
            return self._restore(order, image, verify=False)
        lease = self._ring.lookup(order.target_step)
        if lease is None:
            raise NoCheckpointError(f"the snapshot of step {order.target_step} has been overwritten")
        with lease:
            return self._restore(order, lease.image, verify=True)

    def _restore(self, order: RestoreOrder, image: StateImage, *, verify: bool) -> Restored:
        rig, started_s = self._rig, time.monotonic()
        left_out = set(rig.left_out.batches)
        self._structure.aim(rig.global_step, image)
        rig.clear_gradients()
        try:
            staged = stage_restore(self._state, image, verify=verify)
            staged.commit(order.refuses)
            found = self._state.fingerprint().total
        except (KeyError, TypeError, ValueError) as error:  # a piece, the job's cursor for one, does not know it
            raise StateMismatchError([f"{type(error).__name__}: {error}"]) from error
        finally:  # also after a failure: what was undone may have been grafted and regrouped on the way
            rig.growth.topology.advance(rig.global_step)
            rig.grew()
        rig.left_out.batches |= left_out  # what is spoiled stays so
        rig.growth.controller.apply(rig.global_step)
        self._ring.forget_after(rig.global_step)
        return Restored(
            position=image.position,
            state_digest=found,
            expected_digest=image.seal().total,
            latency_ms=(time.monotonic() - started_s) * 1000,
            place=EpochPlace(**asdict(rig.epoch)),
            seeds=tuple(rig.growth.topology.states(rig.global_step)),
            learning_rates=rig.growth.controller.learning_rates(),
            adjustments=rig.growth.controller.living,
        )

    def _capture(self) -> PointsLost | None:
        if self._lost:
            return None
        started_s = time.monotonic()
        try:
            taken = self._ring.capture(self._state)
        except StateUnsupportedError as error:
            self._lost = True
            return PointsLost(str(error))
        self._cadence = self._cadence.after_snapshot(time.monotonic() - started_s)
        return self._declined(taken) if isinstance(taken, Declined) else None

    def _declined(self, declined: Declined) -> PointsLost | None:
        """Too large for the ring: told once, and not tried again, since the look at the state costs time as well."""
        if declined.reason is not DeclineReason.TOO_LARGE:
            return None
        self._lost = True
        return PointsLost(f"a snapshot takes {declined.needed_bytes / _MIB:.0f} MiB, more than rollback.memory_mb")
