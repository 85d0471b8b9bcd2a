from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tolaria.errors import CheckpointWriteError, JournalUnavailableError
from tolaria.rollback import CheckpointWriter, FastRollbackCache, Filesystem, Lease, Retention, open_storage
from tolaria.rollback.checkpoint_store import CheckpointStore
from tolaria.rollback.writer import Passage

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


def test_a_disk_that_hangs_does_not_hold_up_leaving(tmp_path: Path, training: Training) -> None:
    """Leaving is over in time; what waited is not begun any more, nothing more is taken, and all leases are back."""
    files = GatedFilesystem()
    storage = open_storage(tmp_path, run_id="r", retention=Retention(), files=files)
    cache = FastRollbackCache(entries_max=1, seal=False)
    with storage.journal:
        cache.capture(training.state())
        with CheckpointWriter(storage.checkpoints) as writer:
            hanging = writer.write(hold(cache, 0), metric=None)
            waiting = writer.write(hold(cache, 0), metric=None)
            assert not writer.close(0.01)
        assert hanging is not None
        assert waiting is not None
        assert not hanging.done()
        refused = hold(cache, 0)
        assert writer.write(refused, metric=None) is None
        files.gate.set()
        assert hanging.result(timeout=20).global_step == 0
        with pytest.raises(CancelledError):
            waiting.result(timeout=20)
        assert writer.close(20)
        assert len(storage.checkpoints.restore_points()) == 1
        assert [slot.leases for slot in cache._slots] == [0]


def test_an_interpreter_ends_while_the_disk_hangs() -> None:
    """The writer's thread is nobody's to wait for."""
    code = """
import threading
from types import SimpleNamespace
from tolaria.rollback import CheckpointWriter
class Lease:
    image = None
    def __enter__(self): return self
    def __exit__(self, *error): pass
begun = threading.Event()
def hang(*_given, **_named): begun.set(); threading.Event().wait()
with CheckpointWriter(SimpleNamespace(write=hang)) as writer:
    writer.write(Lease(), metric=None)
    begun.wait()
    writer.close(0.0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("back_to", "state"), [(None, "committed"), (3, "committed"), (2, "superseded")])
def test_what_is_written_of_an_undone_past_is_superseded(
    tmp_path: Path, training: Training, back_to: int | None, state: str
) -> None:
    """A run that goes back while the disk is slow cannot be resumed from what it has undone."""
    files = GatedFilesystem()
    storage = open_storage(tmp_path, run_id="r", retention=Retention(), files=files)
    cache = FastRollbackCache(entries_max=1, seal=False)
    with storage.journal, CheckpointWriter(storage.checkpoints) as writer:
        training.train(3)
        cache.capture(training.state())
        passage = Passage()
        future = writer.write(hold(cache, 3), metric=None, passage=passage)
        assert future is not None
        if back_to is not None:
            passage.went_back(back_to)
            passage.went_back(back_to + 1)
        files.gate.set()
        assert future.result(timeout=20).state == state
        assert [row.global_step for row in storage.checkpoints.restore_points()] == [3] * (state == "committed")


def test_a_past_that_cannot_be_superseded_is_told(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal takes the row and refuses the mark: a failure, with its reason."""

    def refuse(_self: CheckpointStore, _global_step: int) -> int:
        raise JournalUnavailableError("locked")

    monkeypatch.setattr(CheckpointStore, "supersede_after", refuse)
    storage = open_storage(tmp_path, run_id="r", retention=Retention())
    cache = FastRollbackCache(entries_max=1, seal=False)
    with storage.journal, CheckpointWriter(storage.checkpoints) as writer:
        training.train(3)
        cache.capture(training.state())
        passage = Passage()
        passage.went_back(1)
        future = writer.write(hold(cache, 3), metric=None, passage=passage)
        assert future is not None
        with pytest.raises(CheckpointWriteError, match="locked"):
            future.result(timeout=20)
