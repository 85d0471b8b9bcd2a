from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from tolaria.errors import JournalUnavailableError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.database import Journal
from tolaria.journal.reserve import RESERVE_BYTES, Reserve
from tolaria.journal.rows import EmergencyRow, FaultRow, Row

HALT = EmergencyRow("e", 1, "run", "halt", "operator", 30, "smoke")
FAULT = FaultRow("f", 1, "run", "lane_lost", 30, "killed", "x")


class FullJournal(Journal):
    """A journal whose disk has room for no row while `full`, unless the reserve is given up."""

    full = True

    def put(self, row: Row) -> None:
        if self.full and any(self._path.parent.glob("*.reserve")):
            raise JournalUnavailableError("database or disk is full")
        super().put(row)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[FullJournal]:
    """A journal on a full disk."""
    with FullJournal(tmp_path / "journal.sqlite3") as journal:
        yield journal


async def written(journal: AsyncJournal, *rows: Row, until: Callable[[], bool]) -> None:
    """Has the rows written until something holds."""
    for row in rows:
        journal.note(row)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(journal.flush, 180.0)
        with anyio.fail_after(180):
            while not until():
                await anyio.sleep(0.005)
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_an_emergency_is_written_at_once_on_a_full_disk(journal: FullJournal, tmp_path: Path) -> None:
    """Ahead of what waits; the reserve is there again once there is room."""
    async_journal = AsyncJournal(journal, "run")
    await written(async_journal, FAULT, until=lambda: bool(async_journal.failing))
    assert async_journal.waiting == 1
    journal.full = False  # as the removal of the reserve makes it
    await written(async_journal, HALT, until=lambda: not async_journal.waiting)
    assert await anyio.to_thread.run_sync(journal.rows, EmergencyRow) == (HALT,)
    assert (tmp_path / "journal.sqlite3.reserve").stat().st_size == RESERVE_BYTES


@pytest.mark.anyio
async def test_only_an_emergency_gets_the_reserve(journal: FullJournal, tmp_path: Path) -> None:
    """Other rows wait until there is room."""
    async_journal = AsyncJournal(journal, "run")
    await written(async_journal, FAULT, until=lambda: bool(async_journal.failing))
    assert (tmp_path / "journal.sqlite3.reserve").exists()
    await written(async_journal, HALT, until=lambda: async_journal.waiting == 1)
    assert await anyio.to_thread.run_sync(journal.rows, EmergencyRow) == (HALT,)


def test_a_reserve_without_room_is_not_kept(tmp_path: Path) -> None:
    """It is tried again after the next row."""
    reserve = Reserve(tmp_path / "missing" / "reserve")
    reserve.keep()
    assert reserve.give_up() is False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(path: Path) -> None:
    """Writes a file until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(os.urandom(4096))


def test_a_halt_is_written_to_a_disk_that_is_full(small_disk: Path) -> None:
    """A real one: SQLite cannot write any other row, and the halt is there after the journal has been opened again."""

    async def write(journal: Journal) -> None:
        async_journal = AsyncJournal(journal, "run")
        faults = [FaultRow(str(n), n, "run", "x", 1, "", "y" * 4000) for n in range(8)]
        await written(async_journal, *faults, until=lambda: bool(async_journal.failing))
        left = async_journal.waiting
        await written(async_journal, HALT, until=lambda: async_journal.waiting <= left)

    with Journal(small_disk / "journal.sqlite3") as opened:
        fill(small_disk / "filler")
        anyio.run(write, opened)
        assert opened.rows(EmergencyRow) == (HALT,)
    (small_disk / "filler").unlink()
    with Journal(small_disk / "journal.sqlite3") as again:
        assert again.rows(EmergencyRow) == (HALT,)
