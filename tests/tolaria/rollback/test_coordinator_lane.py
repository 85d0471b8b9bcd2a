from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import anyio.to_thread
import pytest

from faults.small_training import Training
from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, RollbackTier
from support.rollbacks import FakeBoard, budget_of
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import Retention
from tolaria.config import RollbackSettings
from tolaria.images import Lease
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import RollbackRow
from tolaria.lane.commands import RestoreGate
from tolaria.rollback.coordinator import RollbackCoordinator
from tolaria.rollback.protocol import Ending, Rollback
from tolaria.state.restore import stage_restore
from tolaria.state.snapshots import SnapshotRing

pytestmark = pytest.mark.anyio

_RESTORE_ID = 1


class StateRestorer:
    """Restores real training state from a ring and from disk; `before_copy` is called when a restore is staged."""

    def __init__(self, training: Training, directory: Path) -> None:
        self.training = training
        self.ring = SnapshotRing(bytes_max=2**28, entries_max=5, seal=True)
        self.storage: Storage = open_storage(directory, run_id="run", retention=Retention(last=3, best="highest"))
        self.over = threading.Event()
        self.gate = RestoreGate()
        self.before_copy: Callable[[], None] = lambda: None

    async def choose(self, rollback: Rollback, /) -> None:
        """The newest snapshot or checkpoint."""
        rollback.chosen_step = await anyio.to_thread.run_sync(self._newest, rollback.tier)

    async def reach_boundary(self) -> None:
        """The training is never under way."""

    async def keep(self, rollback: Rollback, /) -> None:
        """Saves nothing."""

    async def restore(self, rollback: Rollback, /) -> None:
        """Restores in a thread."""
        self.gate = RestoreGate()
        await anyio.to_thread.run_sync(self._restore, rollback, abandon_on_cancel=True)

    def forbid(self, _rollback: Rollback, /) -> bool:
        """Shuts the gate."""
        return self.gate.forbid(_RESTORE_ID)

    def _newest(self, tier: RollbackTier.ValueType) -> int:
        if tier == ROLLBACK_TIER_FAST:
            steps = [info.position.global_step for info in self.ring.snapshots()]
        else:
            steps = [row.global_step for row in self.storage.checkpoints.restore_points()]
        return max(steps)

    def _restore(self, rollback: Rollback) -> None:
        started_s = time.monotonic()
        state = self.training.state()
        lease = self._lease(rollback)
        with lease as image:
            staged = stage_restore(state, image, verify=rollback.tier == ROLLBACK_TIER_FAST)
            self.before_copy()
            try:
                staged.commit(lambda: not self.gate.grant(_RESTORE_ID, rollback.deadline_s))
            finally:
                self.over.set()
            rollback.restored_step = image.position.global_step
            rollback.state_digest, rollback.expected_digest = state.fingerprint().total, image.seal().total
            rollback.restore_ms = (time.monotonic() - started_s) * 1000

    def _lease(self, rollback: Rollback) -> Lease:
        if rollback.tier == ROLLBACK_TIER_FAST:
            lease = self.ring.lookup(rollback.chosen_step)
            assert lease is not None
            return lease
        return Lease(self.storage.checkpoints.load_newest().image)


async def roll_back(restorer: StateRestorer, tier: RollbackTier.ValueType, settings: RollbackSettings) -> Rollback:
    """Carries a rollback out without peers."""
    coordinator = RollbackCoordinator(
        {},
        restorer,
        run_id="run",
        settings=settings,
        board=FakeBoard(),
        journal=AsyncJournal(restorer.storage.journal, "run"),
    )
    rollback = Rollback(tier, None, "test", "operator", rollback_id="r", global_step=14)
    await coordinator.run(rollback)
    return rollback


@pytest.fixture
def restorer(training: Training, tmp_path: Path) -> StateRestorer:
    """Trained to step 8, with a checkpoint of step 4 and a snapshot of step 8."""
    restorer = StateRestorer(training, tmp_path)
    training.train(4)
    restorer.storage.checkpoints.write(training.state().copy())
    training.train(4)
    restorer.ring.capture(training.state())
    return restorer


@pytest.mark.parametrize(("tier", "step"), [(ROLLBACK_TIER_FAST, 8), (ROLLBACK_TIER_FULL, 4)])
async def test_training_after_a_rollback_repeats_the_run(
    restorer: StateRestorer, tier: RollbackTier.ValueType, step: int
) -> None:
    """The two digests are equal, the losses are those of before, and the journal has the row."""
    before = restorer.training.train(6)
    rollback = await roll_back(restorer, tier, budget_of(30.0, 30.0))
    assert (rollback.ending, rollback.restored_step) == (Ending.RESTORED, step)
    assert rollback.state_digest == rollback.expected_digest != ""
    assert restorer.training.train(14 - step)[8 - step :] == before
    row = await anyio.to_thread.run_sync(restorer.storage.journal.find, RollbackRow, "r")
    await anyio.to_thread.run_sync(restorer.storage.journal.close)
    assert row is not None
    assert (row.restored_step, row.state_digest) == (step, rollback.state_digest)


@pytest.mark.parametrize("tier", [ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL])
async def test_past_the_deadline_the_live_state_is_unchanged(
    restorer: StateRestorer, tier: RollbackTier.ValueType
) -> None:
    """A restore that is staged too late never copies, although its thread goes on after the outcome."""
    restorer.training.train(3)
    before = restorer.training.state().fingerprint().total
    staged, done = threading.Event(), threading.Event()

    def wait_for_the_outcome() -> None:
        staged.set()
        assert done.wait(180)

    restorer.before_copy = wait_for_the_outcome
    rollback = await roll_back(restorer, tier, budget_of(0.2, 0.2))
    assert rollback.ending is Ending.DEADLINE_EXCEEDED
    assert staged.is_set()
    done.set()
    assert await anyio.to_thread.run_sync(restorer.over.wait, 10)
    await anyio.to_thread.run_sync(restorer.storage.journal.close)
    assert restorer.training.state().fingerprint().total == before
