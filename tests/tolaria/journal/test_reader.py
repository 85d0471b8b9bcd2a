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
from tolaria.journal import reader
from tolaria.journal.database import Journal
from tolaria.journal.reader import read_journal
from tolaria.journal.rows import CheckpointRow, values_digest

_WRITES = """
import os, pathlib, signal, sys
from tolaria.journal.database import Journal
from tolaria.journal.rows import CheckpointRow
journal = Journal(pathlib.Path(sys.argv[1]))
for step in range(20):
    journal.put(CheckpointRow(f"c{step}", step, "run", step, 1, 1, "d", None))
print("written", flush=True)
sys.stdin.read()
"""


def filled(path: Path, rows: int = 20) -> Path:
    """A closed journal with this number of checkpoints."""
    with Journal(path) as journal:
        for step in range(rows):
            journal.put(CheckpointRow(f"c{step}", step, "run", step, 1, 1, "d", None))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Names and bytes of the folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def steps(path: Path) -> list[int]:
    """Steps of the rows that are read."""
    return [row.global_step for row in read_journal(path, CheckpointRow)]


def writer(path: Path) -> subprocess.Popen[str]:
    """Starts a process that writes twenty rows and keeps the journal open until its standard input closes."""
    command = [sys.executable, "-c", _WRITES, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


def test_a_closed_journal_is_read_without_changes(tmp_path: Path) -> None:
    """SQLite creates no side files."""
    path = filled(tmp_path / "j # ?%.sqlite3")
    before = contents(tmp_path)
    assert steps(path) == list(range(20))
    assert contents(tmp_path) == before


def test_a_read_only_folder_is_read(tmp_path: Path) -> None:
    """A backup on a read-only volume can be verified."""
    (tmp_path / "state").mkdir()
    path = filled(tmp_path / "state" / "j")
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        assert steps(path) == list(range(20))
    finally:
        path.parent.chmod(0o700)


def test_a_journal_in_use_and_one_whose_writer_was_killed_are_read(tmp_path: Path) -> None:
    """Rows that are only in the log are read, and no file changes."""
    with writer(tmp_path / "j") as process:
        before = contents(tmp_path)
        assert set(before) == {"j", "j-wal", "j-shm", "j.reserve"}
        assert steps(tmp_path / "j") == list(range(20))
        assert contents(tmp_path) == before
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=180)
        assert steps(tmp_path / "j") == list(range(20))
        assert contents(tmp_path) == before


def test_a_copy_without_the_shm_file_is_read(tmp_path: Path) -> None:
    """Journal and log are enough for a backup; SQLite creates the shm file elsewhere."""
    (tmp_path / "copy").mkdir()
    with writer(tmp_path / "j") as process:
        for name in ("j", "j-wal"):
            shutil.copyfile(tmp_path / name, tmp_path / "copy" / name)
        process.communicate("", timeout=180)
    before = contents(tmp_path / "copy")
    assert steps(tmp_path / "copy" / "j") == list(range(20))
    assert contents(tmp_path / "copy") == before


def test_reading_finds_the_damage_that_opening_finds(tmp_path: Path) -> None:
    """For each bit of the header and random other bits: both agree, and reading changes nothing."""
    good = filled(tmp_path / "j").read_bytes()
    generator = random.Random(4)
    bits = [*range(100 * 8), *(generator.randrange(800, len(good) * 8) for _ in range(200))]
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
    """An empty file or a file of another kind is not a journal."""
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(JournalDamagedError):
        read_journal(tmp_path / "j", CheckpointRow)


def test_a_missing_journal_is_unavailable_and_not_created(tmp_path: Path) -> None:
    """The error says that there is no journal."""
    with pytest.raises(JournalUnavailableError, match="there is no journal"):
        read_journal(tmp_path / "j", CheckpointRow)
    assert list(tmp_path.iterdir()) == []


def test_a_newer_journal_is_not_damage(tmp_path: Path) -> None:
    """A later version has other tables."""
    path = filled(tmp_path / "j")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET schema_version = 99, row_digest = ?", (values_digest("meta", (99,)),))
    connection.close()
    with pytest.raises(JournalNewerError):
        read_journal(path, CheckpointRow)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_a_refusal_by_the_system_is_not_damage(tmp_path: Path) -> None:
    """A journal without read permission is unavailable."""
    path = filled(tmp_path / "j")
    path.chmod(0)
    with pytest.raises(JournalUnavailableError):
        read_journal(path, CheckpointRow)


def test_a_service_may_end_while_the_journal_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The side files disappear between the check and the opening: the journal is read as a closed one."""
    path = filled(tmp_path / "j")
    service = Journal(path)
    connect = reader.connect_read_only
    tries: list[str] = []

    def late(uri: str) -> sqlite3.Connection:
        tries.append(uri)
        service.close()
        return connect(uri)

    monkeypatch.setattr(reader, "connect_read_only", late)
    assert steps(path) == list(range(20))
    assert len(tries) == 2
    Journal(path).close()


def test_a_journal_that_is_opened_and_closed_repeatedly_is_read(tmp_path: Path) -> None:
    """A service may start, write or end at any moment while the journal is read."""
    path = filled(tmp_path / "j")
    churn = (
        "import pathlib, sys\nfrom tolaria.journal.database import Journal\n"
        "from tolaria.journal.rows import CheckpointRow\nprint('up', flush=True)\n"
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
