from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tolaria.errors import JournalDamagedError, JournalError, JournalNewerError, JournalUnavailableError
from tolaria.rollback import CheckpointRow, Journal, journal_reading
from tolaria.rollback.journal_reading import read_journal
from tolaria.rollback.journal_rows import values_digest

_WRITES = """
import os, pathlib, signal, sys
from tolaria.rollback import CheckpointRow, Journal
journal = Journal(pathlib.Path(sys.argv[1]))
for step in range(20):
    journal.put(CheckpointRow(f"c{step}", step, "run", step, 1, 1, "d", None))
print("written", flush=True)
sys.stdin.read()
"""


def filled(path: Path, rows: int = 20) -> Path:
    """A journal of so many checkpoints, closed."""
    with Journal(path) as journal:
        for step in range(rows):
            journal.put(CheckpointRow(f"c{step}", step, "run", step, 1, 1, "d", None))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def steps(path: Path) -> list[int]:
    """What is read."""
    return [row.global_step for row in read_journal(path, CheckpointRow)]


def writer(path: Path) -> subprocess.Popen[str]:
    """Another process that has written twenty rows and keeps the journal open until its standard input ends."""
    command = [sys.executable, "-c", _WRITES, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


def test_a_closed_journal_is_read_and_left_alone(tmp_path: Path) -> None:
    """Not even the files are made that SQLite keeps beside an open one."""
    path = filled(tmp_path / "j # ?%.sqlite3")
    before = contents(tmp_path)
    assert steps(path) == list(range(20))
    assert contents(tmp_path) == before


def test_a_folder_that_nobody_may_write_to_is_read(tmp_path: Path) -> None:
    """A backup on a read-only volume can be looked at."""
    (tmp_path / "state").mkdir()
    path = filled(tmp_path / "state" / "j")
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        assert steps(path) == list(range(20))
    finally:
        path.parent.chmod(0o700)


def test_a_journal_in_use_and_one_whose_writer_was_killed_are_read(tmp_path: Path) -> None:
    """What is only in the log counts, and every byte stays, of the files beside the journal too."""
    with writer(tmp_path / "j") as process:
        before = contents(tmp_path)
        assert set(before) == {"j", "j-wal", "j-shm"}
        assert steps(tmp_path / "j") == list(range(20))
        assert contents(tmp_path) == before
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=20)
        assert steps(tmp_path / "j") == list(range(20))
        assert contents(tmp_path) == before


def test_a_copy_without_the_shared_file_is_read(tmp_path: Path) -> None:
    """Journal and log are all that a backup needs; what SQLite makes for them is made elsewhere."""
    (tmp_path / "copy").mkdir()
    with writer(tmp_path / "j") as process:
        for name in ("j", "j-wal"):
            shutil.copyfile(tmp_path / name, tmp_path / "copy" / name)
        process.communicate("", timeout=20)
    before = contents(tmp_path / "copy")
    assert steps(tmp_path / "copy" / "j") == list(range(20))
    assert contents(tmp_path / "copy") == before


def test_every_flipped_bit_that_a_start_would_find_is_found(tmp_path: Path) -> None:
    """Header bit by bit, the rest by chance: reading and opening agree on what is damage; reading changes nothing."""
    good = filled(tmp_path / "j").read_bytes()
    chance = random.Random(4)  # noqa: S311 - the same bits each time
    bits = [*range(100 * 8), *(chance.randrange(800, len(good) * 8) for _ in range(200))]
    found = 0
    for bit in bits:
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "j").write_bytes(flipped)
        read = _read(tmp_path / "j")
        assert contents(tmp_path) == {"j": bytes(flipped)}
        assert read is _opened(tmp_path / "j"), f"bit {bit}"
        found += read is not None
    assert found > 50


def _read(path: Path) -> type[JournalError] | None:
    try:
        read_journal(path, CheckpointRow)
    except JournalError as error:
        return type(error)
    return None


def _opened(path: Path) -> type[JournalError] | None:
    try:
        Journal(path).close()
    except JournalError as error:
        return type(error)
    return None


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 500])
def test_a_foreign_file_is_damage(tmp_path: Path, content: bytes) -> None:
    """An empty file or another kind of file is not a journal."""
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(JournalDamagedError):
        read_journal(tmp_path / "j", CheckpointRow)


def test_no_journal_is_no_damage_and_none_is_made(tmp_path: Path) -> None:
    """What is not there is told as that."""
    with pytest.raises(JournalUnavailableError, match="there is no journal"):
        read_journal(tmp_path / "j", CheckpointRow)
    assert list(tmp_path.iterdir()) == []


def test_a_newer_journal_is_not_called_damaged(tmp_path: Path) -> None:
    """A later version has other tables."""
    path = filled(tmp_path / "j")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET schema_version = 2, row_digest = ?", (values_digest("meta", (2,)),))
    connection.close()
    with pytest.raises(JournalNewerError):
        read_journal(path, CheckpointRow)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_refusal_of_the_system_is_no_damage(tmp_path: Path) -> None:
    """Without the right to read, nobody can say that a journal is damaged."""
    path = filled(tmp_path / "j")
    path.chmod(0)
    with pytest.raises(JournalUnavailableError):
        read_journal(path, CheckpointRow)


def test_a_service_that_ends_while_the_journal_is_being_opened_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files beside it are gone between the look and the opening: it is read as the closed one that it is now."""
    path = filled(tmp_path / "j")
    service = Journal(path)
    connected = journal_reading._connected
    tries: list[str] = []

    def late(uri: str) -> sqlite3.Connection:
        tries.append(uri)
        service.close()
        return connected(uri)

    monkeypatch.setattr(journal_reading, "_connected", late)
    assert steps(path) == list(range(20))
    assert len(tries) == 2
    Journal(path).close()


def test_a_journal_that_is_opened_and_closed_all_the_time_is_read(tmp_path: Path) -> None:
    """A service that starts, writes or ends at any moment of the reading is no damage."""
    path = filled(tmp_path / "j")
    churn = (
        "import pathlib, sys\nfrom tolaria.rollback import CheckpointRow, Journal\nprint('up', flush=True)\n"
        "step = 20\n"
        "while True:\n"
        "    with Journal(pathlib.Path(sys.argv[1])) as journal:\n"
        "        for _ in range(step % 7):\n"
        "            step += 1\n"
        "            journal.put(CheckpointRow(f'c{step % 50}', step, 'run', step, 1, 1, 'd', None))\n"
        "        step += 1\n"
    )
    with subprocess.Popen([sys.executable, "-c", churn, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        try:
            assert all(len(read_journal(path, CheckpointRow)) >= 20 for _ in range(300))
        finally:
            process.kill()
