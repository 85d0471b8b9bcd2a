from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tolaria.errors import CheckpointWriteError
from tolaria.rollback import CheckpointWriter, FastRollbackCache, Filesystem, Lease, Retention, open_storage

if TYPE_CHECKING:
    from faults.small_training import Training


class GatedFilesystem(Filesystem):
    """Makes directories only once the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.fails = False

    def make_directory(self, path: Path) -> None:
        assert self.gate.wait(20)
        if self.fails:
            raise OSError(28, "No space left on device")
        super().make_directory(path)


def hold(cache: FastRollbackCache, step: int) -> Lease:
    """A lease that must be there."""
    lease = cache.hold(step)
    assert lease is not None
    return lease


def test_at_most_one_waits_and_training_goes_on_meanwhile(tmp_path: Path, training: Training) -> None:
    """While the disk hangs one task runs, one waits, a third is declined, and no leased image changes."""
    files = GatedFilesystem()
    storage = open_storage(tmp_path, run_id="r", retention=Retention(), files=files)
    cache = FastRollbackCache(entries_max=3, seal=False)
    with storage.journal:
        expected = training.state().fingerprint().total
        cache.capture(training.state())
        with CheckpointWriter(storage.checkpoints) as writer:
            first = writer.write(hold(cache, 0), metric=None)
            second = writer.seal(hold(cache, 0))
            assert writer.write(hold(cache, 0), metric=None) is None
            for _ in range(4):
                training.train(1)
                cache.capture(training.state())
            files.gate.set()
        assert first is not None
        assert second is not None
        assert first.result().digest == second.result().total == expected
        with CheckpointWriter(storage.checkpoints) as writer:
            assert writer.write(hold(cache, 4), metric=1.0) is not None
        assert [row.global_step for row in storage.checkpoints.restore_points()] == [0, 4]


def test_a_failed_write_is_in_the_future_and_releases_its_lease(tmp_path: Path, training: Training) -> None:
    """The cause reaches whoever asked, the ring has its memory back, and the next write works."""
    files = GatedFilesystem()
    files.gate.set()
    files.fails = True
    storage = open_storage(tmp_path, run_id="r", retention=Retention(), files=files)
    cache = FastRollbackCache(entries_max=1, seal=False)
    with storage.journal, CheckpointWriter(storage.checkpoints) as writer:
        cache.capture(training.state())
        failed = writer.write(hold(cache, 0), metric=None)
        assert failed is not None
        with pytest.raises(CheckpointWriteError, match="ENOSPC"):
            failed.result()
        training.train(1)
        cache.capture(training.state())
        files.fails = False
        written = writer.write(hold(cache, 1), metric=None)
        assert written is not None
        assert written.result().global_step == 1
