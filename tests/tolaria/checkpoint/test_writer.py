from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from faults.small_training import new_ring
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import CheckpointStore, Retention
from tolaria.checkpoint.writer import CaptureMark, CheckpointWriter
from tolaria.errors import CheckpointWriteError, JournalUnavailableError
from tolaria.filesystem import Filesystem
from tolaria.values.lineage import Lineage
from tolaria.values.training import Position

if TYPE_CHECKING:
    from faults.small_training import Training
    from tolaria.images import Lease
    from tolaria.state.snapshots import SnapshotRing


class GatedFilesystem(Filesystem):
    """Creates directories only while the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.fails = False

    def make_directory(self, path: Path) -> None:
        assert self.gate.wait(180)
        if self.fails:
            raise OSError(28, "No space left on device")
        super().make_directory(path)


def opened(directory: Path, files: Filesystem | None = None) -> Storage:
    """A state directory that keeps three checkpoints."""
    return open_storage(directory, run_id="r", retention=Retention(last=3, best="highest"), files=files)


def hold(ring: SnapshotRing, step: int) -> Lease:
    """A lease of the snapshot of this step."""
    lease = ring.hold(step)
    assert lease is not None
    return lease


def test_one_image_is_written_and_one_waits_while_training_continues(tmp_path: Path, training: Training) -> None:
    """While the disk hangs a third image is declined, and no leased image changes."""
    files = GatedFilesystem()
    storage, ring = opened(tmp_path, files), new_ring(entries_max=3)
    with storage.journal:
        expected = training.state().fingerprint().total
        ring.capture(training.state())
        with CheckpointWriter(storage.checkpoints) as writer:
            first = writer.write(hold(ring, 0), metric=None)
            second = writer.write(hold(ring, 0), metric=None)
            assert writer.write(hold(ring, 0), metric=None) is None
            assert writer.pending == 2
            for _ in range(4):
                training.train(1)
                ring.capture(training.state())
            files.gate.set()
        assert first is not None
        assert second is not None
        assert first.result().digest == second.result().digest == expected
        assert writer.pending == 0
        with CheckpointWriter(storage.checkpoints) as writer:
            assert writer.write(hold(ring, 4), metric=1.0) is not None
        assert [row.global_step for row in storage.checkpoints.restore_points()] == [0, 0, 4]


def test_a_failed_write_is_in_the_future_and_releases_its_lease(tmp_path: Path, training: Training) -> None:
    """The caller gets the cause, the ring its memory, and the next write succeeds."""
    files = GatedFilesystem()
    files.gate.set()
    files.fails = True
    storage, ring = opened(tmp_path, files), new_ring(entries_max=1)
    with storage.journal, CheckpointWriter(storage.checkpoints) as writer:
        ring.capture(training.state())
        failed = writer.write(hold(ring, 0), metric=None)
        assert failed is not None
        with pytest.raises(CheckpointWriteError, match="ENOSPC"):
            failed.result()
        training.train(1)
        ring.capture(training.state())
        files.fails = False
        written = writer.write(hold(ring, 1), metric=None)
        assert written is not None
        assert written.result().global_step == 1


def test_a_disk_that_hangs_does_not_block_leaving(tmp_path: Path, training: Training) -> None:
    """Closing times out; waiting images are cancelled, further ones declined, and all leases are released."""
    files = GatedFilesystem()
    storage, ring = opened(tmp_path, files), new_ring(entries_max=1)
    with storage.journal:
        ring.capture(training.state())
        with CheckpointWriter(storage.checkpoints) as writer:
            hanging = writer.write(hold(ring, 0), metric=None)
            waiting = writer.write(hold(ring, 0), metric=None)
            assert not writer.close(0.01)
        assert hanging is not None
        assert waiting is not None
        assert not hanging.done()
        assert writer.write(hold(ring, 0), metric=None) is None
        files.gate.set()
        assert hanging.result(timeout=180).global_step == 0
        with pytest.raises(CancelledError):
            waiting.result(timeout=180)
        assert writer.close(20)
        assert len(storage.checkpoints.restore_points()) == 1
        training.train(1)
        assert ring.capture(training.state()) == Position(1, 1)  # no lease is left


def test_an_interpreter_exits_while_the_disk_hangs() -> None:
    """The interpreter does not wait for the writer's thread."""
    code = """
import threading
from types import SimpleNamespace
from tolaria.checkpoint.writer import CheckpointWriter
class Lease:
    def __enter__(self): return None
    def __exit__(self, *error): pass
begun = threading.Event()
def hang(*_given, **_named): begun.set(); threading.Event().wait()
with CheckpointWriter(SimpleNamespace(write=hang)) as writer:
    writer.write(Lease(), metric=None)
    begun.wait()
    writer.close(0.0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=180)


@pytest.mark.parametrize(("back_to", "state"), [(None, "committed"), (3, "committed"), (2, "superseded")])
def test_an_image_after_the_rollback_step_is_superseded(
    tmp_path: Path, training: Training, back_to: int | None, state: str
) -> None:
    """A run that is rolled back while the disk is slow cannot be resumed from what was undone."""
    files = GatedFilesystem()
    storage, ring = opened(tmp_path, files), new_ring(entries_max=1)
    with storage.journal, CheckpointWriter(storage.checkpoints) as writer:
        training.train(3)
        ring.capture(training.state())
        mark = CaptureMark()
        future = writer.write(hold(ring, 3), metric=None, mark=mark)
        assert future is not None
        if back_to is not None:
            mark.live = Lineage().back_to(back_to, 2)
        files.gate.set()
        assert future.result(timeout=180).state == state
        assert [row.global_step for row in storage.checkpoints.restore_points()] == [3] * (state == "committed")


def test_a_row_that_cannot_be_superseded_is_a_failure(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal takes the row and refuses the mark: the future has the reason."""

    def refuse(_self: CheckpointStore, _lineage: Lineage, _detail: str) -> None:
        raise JournalUnavailableError("locked")

    monkeypatch.setattr(CheckpointStore, "follow", refuse)
    storage, ring = opened(tmp_path), new_ring(entries_max=1)
    with storage.journal, CheckpointWriter(storage.checkpoints) as writer:
        training.train(3)
        ring.capture(training.state())
        mark = CaptureMark()
        mark.live = Lineage().back_to(1, 2)
        future = writer.write(hold(ring, 3), metric=None, mark=mark)
        assert future is not None
        with pytest.raises(CheckpointWriteError, match="locked"):
            future.result(timeout=180)
