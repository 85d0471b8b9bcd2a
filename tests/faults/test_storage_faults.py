from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.small_training import Training, new_training
from faults.torture import BLOCK, harm_checkpoints, harm_journal
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import CheckpointStore, Retention
from tolaria.errors import CheckpointWriteError, JournalUnavailableError
from tolaria.filesystem import Filesystem
from tolaria.journal.database import Journal
from tolaria.journal.rows import CheckpointRow, FaultRow, Row
from tolaria.values.training import Position

CALLS = ["make_directory", "create", "write", "sync", "close", "sync_directory", "rename", "remove_tree"]
READS = ["open", "size_bytes", "read_into"]


class FailingFilesystem(Filesystem):
    """Fails the n-th call of one name, and with `for_good` all later ones, without effect."""

    def __init__(self, name: str, number: int, code: int, *, for_good: bool) -> None:
        self._name, self._number, self._code, self._for_good = name, number, code, for_good
        self.count = 0
        self.failed = 0

    def __getattribute__(self, name: str) -> object:
        if name in CALLS + READS:
            Filesystem.__getattribute__(self, "_meet")(name)
        return super().__getattribute__(name)

    def _meet(self, name: str) -> None:
        if name != self._name:
            return
        self.count += 1
        if self.count == self._number or (self._for_good and self.count > self._number):
            self.failed += 1
            raise OSError(self._code, "made to fail")


class StingyFilesystem(Filesystem):
    """Reads and writes a few bytes at a time, as a system under pressure may."""

    def write(self, descriptor: int, content: memoryview) -> int:
        return super().write(descriptor, content[:1000])

    def read_into(self, descriptor: int, buffer: memoryview) -> int:
        return super().read_into(descriptor, buffer[:777])


class RecordingFilesystem(Filesystem):
    """Records the names of calls in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> object:
        if name in CALLS:
            self.calls.append(name)
        return super().__getattribute__(name)


class FullJournal(Journal):
    """A journal whose writes fail while `full` is set."""

    full = False

    def put(self, row: Row) -> None:
        if self.full:
            raise JournalUnavailableError("the journal cannot be used: database or disk is full")
        super().put(row)


@pytest.fixture
def training() -> Training:
    """A run at its start."""
    return new_training()


def opened(directory: Path, files: Filesystem | None = None) -> Storage:
    """Opens the directory as a start does."""
    return open_storage(directory, run_id="r", retention=Retention(last=2, best="highest"), files=files)


def write(store: CheckpointStore, training: Training, step: int) -> CheckpointRow:
    """Writes a checkpoint of this step."""
    training.position = Position(step, 1)
    return store.write(training.state().copy())


def numbers() -> Iterator[tuple[str, int]]:
    """Yields each call that a write with retention makes, by name and number."""
    counts = {
        "make_directory": 1,
        "create": 3,
        "sync": 3,
        "close": 3,
        "sync_directory": 2,
        "rename": 1,
        "remove_tree": 1,
    }
    for name, count in {**counts, "write": 12}.items():
        yield from ((name, number) for number in range(1, count + 1))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize(("name", "number"), list(numbers()))
def test_any_failing_call_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, training: Training, name: str, number: int, *, for_good: bool, code: int
) -> None:
    """After the failure of any call reported checkpoints load, the cause is recorded, and the next write succeeds."""
    storage = opened(tmp_path)
    with storage.journal:
        for step in (1, 2):
            write(storage.checkpoints, training, step)
        files = FailingFilesystem(name, number, code, for_good=for_good)
        failing = CheckpointStore(
            tmp_path, storage.journal, run_id="r", retention=Retention(last=2, best="highest"), files=files
        )
        reported = 2
        if name == "remove_tree":  # of pruned checkpoints: the new one is committed
            reported = write(failing, training, 3).global_step
        else:
            with pytest.raises(CheckpointWriteError) as raised:
                write(failing, training, 3)
            assert raised.value.reason == errno.errorcode[code]
            assert [row.reason for row in storage.journal.rows(FaultRow)] == [str(raised.value)]
        assert files.failed > 0
    again = opened(tmp_path)
    with again.journal:
        loaded = again.checkpoints.load_newest()
        loaded.image.verify()
        assert (loaded.damaged, loaded.row.global_step >= reported) == ((), True)
        assert write(again.checkpoints, training, 4).global_step == 4
        assert again.checkpoints.load_newest().row.global_step == 4


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_an_unreadable_checkpoint_is_skipped_but_not_moved(
    tmp_path: Path, training: Training, name: str, code: int
) -> None:
    """A refusal by the system is not damage: an older checkpoint is loaded, and the newest once it can be read."""
    storage = opened(tmp_path)
    with storage.journal:
        for step in (1, 2):
            write(storage.checkpoints, training, step)
        files = FailingFilesystem(name, 1, code, for_good=False)
        failing = CheckpointStore(
            tmp_path, storage.journal, run_id="r", retention=Retention(last=3, best="highest"), files=files
        )
        loaded = failing.load_newest()
        assert (loaded.row.global_step, [d.reason for d in loaded.damaged]) == (1, [errno.errorcode[code]])
        assert storage.checkpoints.load_newest().row.global_step == 2


def test_short_writes_and_reads_make_whole_checkpoints(tmp_path: Path, training: Training) -> None:
    """Short reads and writes only take longer."""
    storage = opened(tmp_path, StingyFilesystem())
    with storage.journal:
        row = write(storage.checkpoints, training, 1)
        assert storage.checkpoints.load_newest().image.verify().total == row.digest


def test_syncs_are_ordered_for_a_power_failure(tmp_path: Path, training: Training) -> None:
    """Files are synced before their directory, that before the rename, and the parent after it."""
    files = RecordingFilesystem()
    storage = opened(tmp_path, files)
    with storage.journal:
        files.calls.clear()
        write(storage.checkpoints, training, 1)
    order = [call for call in files.calls if call not in {"write", "close"}]
    assert order == ["make_directory", *["create", "sync"] * 3, "sync_directory", "rename", "sync_directory"]


def test_a_full_journal_fails_the_write_and_its_cause_is_recorded_later(tmp_path: Path, training: Training) -> None:
    """A checkpoint without a row does not exist; the fault is recorded once the journal can be written."""
    storage = opened(tmp_path)
    storage.journal.close()
    with FullJournal(tmp_path / "journal.sqlite3") as journal:
        store = CheckpointStore(tmp_path, journal, run_id="r", retention=Retention(last=3, best="highest"))
        write(store, training, 1)
        journal.full = True
        with pytest.raises(CheckpointWriteError, match="journal"):
            write(store, training, 2)
        assert [row.global_step for row in store.restore_points()] == [1]
        journal.full = False
        write(store, training, 3)
        assert [row.stage for row in journal.rows(FaultRow)] == ["journal"]
    again = opened(tmp_path)
    with again.journal:
        assert again.checkpoints.load_newest().row.global_step == 3


def test_damaged_checkpoints_are_found() -> None:
    """With 200 flipped bits and files cut at each 4 KB, damage is quarantined and the older checkpoint loaded."""
    assert harm_checkpoints(1, 200, every=BLOCK) == []


@pytest.mark.parametrize("with_log", [False, True], ids=["file", "log"])
def test_damaged_journals_are_found_and_rebuilt(*, with_log: bool) -> None:
    """With 200 flipped bits and cuts at each 4 KB, no row is wrong and no checkpoint lost."""
    assert harm_journal(1, 200, every=BLOCK, with_log=with_log) == []


def test_kills_while_writing_lose_nothing_reported() -> None:
    """SIGKILL at 15 random moments, each time continuing with what the last one left."""
    script = Path(__file__).with_name("torture.py")
    found = subprocess.run(
        [sys.executable, script, "--kills-only"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (found.returncode, found.stderr) == (0, ""), found.stdout
