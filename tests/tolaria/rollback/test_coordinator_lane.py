from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import anyio.to_thread
import pytest

from faults.small_training import Training
from leyline.v1.enums_pb2 import (
    ROLLBACK_TIER_FAST,
    ROLLBACK_TIER_FULL,
    ROLLBACK_TIER_UNSPECIFIED,
    RollbackTier,
)
from tolaria.checkpoint.retention import Retention
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.journal.rows import RollbackRow
from tolaria.rollback.budget import RollbackBudgets
from tolaria.rollback.coordinator import Clocks, RollbackCoordinator
from tolaria.rollback.orders import Ending, RestoreOrder, RestoreOutcome, RollbackRequest
from tolaria.state.restore import stage_restore
from tolaria.state.snapshots import SnapshotRing

pytestmark = pytest.mark.anyio


class RealLane:
    """A lane around real training state, ring and checkpoints; `before_copy` is called when a restore is staged."""

    def __init__(self, training: Training, directory: Path) -> None:
        self.training = training
        self.cache = SnapshotRing(bytes_max=2**28, entries_max=5, seal=True)
        self.storage: Storage = open_storage(directory, run_id="run", retention=Retention(last=3, best="highest"))
        self.over = threading.Event()
        self.before_copy: Callable[[], None] = lambda: None

    async def locate(self, tier: RollbackTier.ValueType, at_or_before: int | None, /) -> int | None:
        return await anyio.to_thread.run_sync(self._locate, tier, at_or_before)

    async def restore(self, order: RestoreOrder, /) -> RestoreOutcome:
        return await anyio.to_thread.run_sync(self._restore, order, abandon_on_cancel=True)

    async def record(self, row: RollbackRow) -> None:
        await anyio.to_thread.run_sync(self.storage.journal.put, row)

    def _locate(self, tier: RollbackTier.ValueType, at_or_before: int | None) -> int | None:
        if tier == ROLLBACK_TIER_FAST:
            steps = [info.position.global_step for info in self.cache.snapshots()]
        else:
            steps = [row.global_step for row in self.storage.checkpoints.restore_points()]
        return max((step for step in steps if at_or_before is None or step <= at_or_before), default=None)

    def _restore(self, order: RestoreOrder) -> RestoreOutcome:
        started_s = time.monotonic()
        state = self.training.state()
        if order.tier == ROLLBACK_TIER_FAST:
            lease = self.cache.lookup(order.target_step)
            assert lease is not None
            image = lease.image
        else:
            image = self.storage.checkpoints.load_newest(order.expired, at_or_before=order.target_step).image
        staged = stage_restore(state, image, verify=order.tier == ROLLBACK_TIER_FAST)
        self.before_copy()
        try:
            staged.commit(order.refuses)
        finally:
            self.over.set()
        return RestoreOutcome(
            restored_step=image.position.global_step,
            state_digest=state.fingerprint().total,
            expected_digest=image.seal().total,
            latency_ms=(time.monotonic() - started_s) * 1000,
        )


def coordinator_of(lane: RealLane, budgets: RollbackBudgets) -> RollbackCoordinator:
    """Without peers."""
    return RollbackCoordinator(
        [], lane, run_id="run", budgets=budgets, on_slot=lambda *_: None, record=lane.record, clocks=Clocks()
    )


@pytest.fixture
def lane(training: Training, tmp_path: Path) -> RealLane:
    """Trained to step 12, with a checkpoint of step 4 and a snapshot of step 8."""
    lane = RealLane(training, tmp_path)
    training.train(4)
    lane.storage.checkpoints.write(training.state().copy())
    training.train(4)
    lane.cache.capture(training.state())
    return lane


@pytest.mark.parametrize(
    ("tier", "step"), [(ROLLBACK_TIER_UNSPECIFIED, 8), (ROLLBACK_TIER_FAST, 8), (ROLLBACK_TIER_FULL, 4)]
)
async def test_training_on_from_a_rollback_repeats_the_run(
    lane: RealLane, tier: RollbackTier.ValueType, step: int
) -> None:
    """The two digests are equal, the losses after it are those of before, and the journal has the row."""
    before = {8: lane.training.train(6)}
    before[4] = []
    outcome = await coordinator_of(lane, RollbackBudgets()).roll_back(RollbackRequest("r", tier, None, 14, "test"))
    assert (outcome.ending, outcome.restored_step) == (Ending.RESTORED, step)
    assert outcome.state_digest == outcome.expected_digest != ""
    losses = lane.training.train(14 - step)
    assert losses[8 - step :] == before[8]
    row = await anyio.to_thread.run_sync(lane.storage.journal.find, RollbackRow, "r")
    await anyio.to_thread.run_sync(lane.storage.journal.close)
    assert row is not None
    assert (row.restored_step, row.state_digest) == (step, outcome.state_digest)


@pytest.mark.parametrize("tier", [ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL])
async def test_past_the_deadline_the_live_state_is_bit_equal_to_before(
    lane: RealLane, tier: RollbackTier.ValueType
) -> None:
    """A restore that is staged too late never copies, although its thread goes on after the outcome."""
    lane.training.train(3)
    before = lane.training.state().fingerprint().total
    staged, done = threading.Event(), threading.Event()

    def wait_for_the_outcome() -> None:
        staged.set()
        assert done.wait(10)

    lane.before_copy = wait_for_the_outcome
    budgets = RollbackBudgets(fast_s=0.2, full_s=0.2)
    outcome = await coordinator_of(lane, budgets).roll_back(RollbackRequest("r", tier, None, 11, "test"))
    assert outcome.ending is Ending.DEADLINE_EXCEEDED
    assert staged.is_set()
    done.set()
    assert await anyio.to_thread.run_sync(lane.over.wait, 10)
    await anyio.to_thread.run_sync(lane.storage.journal.close)
    assert lane.training.state().fingerprint().total == before
