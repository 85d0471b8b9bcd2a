from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from tolaria.errors import JournalUnavailableError
from tolaria.journal import async_journal as async_journal_module
from tolaria.journal.async_journal import LOG_INTERVAL_S, RETRY_S_MAX, RETRY_S_MIN, AsyncJournal
from tolaria.journal.database import Journal
from tolaria.journal.rows import AdminActionRow, AdminCallRow, CommandRow, EmergencyRow, FaultRow, Row

pytestmark = pytest.mark.anyio

TABLE_PAGES = 10**6


class GatedJournal(Journal):
    """A journal whose writes wait while `gate` is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gate = threading.Event()
        self.gate.set()

    def put(self, row: Row) -> None:
        assert self.gate.wait(180)
        super().put(row)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """Every SQLite connection, in the order of opening."""
    found: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def recorded(*arguments: Any, **options: Any) -> sqlite3.Connection:
        found.append(connect(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(sqlite3, "connect", recorded)
    return found


@pytest.fixture
def journal(tmp_path: Path, connections: list[sqlite3.Connection]) -> Iterator[GatedJournal]:
    """An empty journal."""
    with GatedJournal(tmp_path / "journal.sqlite3") as journal:
        yield journal


@pytest.fixture
def limit_pages(journal: GatedJournal, connections: list[sqlite3.Connection]) -> Callable[[int], None]:
    """Limits the pages of the journal's file; beyond the limit SQLite reports a full disk."""

    def limit(pages: int) -> None:
        connections[-1].execute(f"PRAGMA max_page_count = {pages}").fetchall()

    return limit


class RecordedSleep:
    """Records durations instead of sleeping, and calls `during` with the number of sleeps so far."""

    def __init__(self, during: Callable[[int], None]) -> None:
        self.slept_s: list[float] = []
        self._during = during

    async def __call__(self, time_s: float) -> None:
        self.slept_s.append(time_s)
        await anyio.lowlevel.checkpoint()
        await anyio.to_thread.run_sync(self._during, len(self.slept_s))


def fault(key: str) -> FaultRow:
    """A row larger than the rest of a page."""
    return FaultRow(key, 1, "run", "test", 1, "stage", "x" * 5000)


def command(key: str) -> CommandRow:
    """A small row of the most frequent kind."""
    return CommandRow(key, 1, "run", "seed", 1, "applied", "")


def action(answer: bytes) -> AdminActionRow:
    """An operator's request with its answer."""
    return AdminActionRow("q", 1, "run", "PauseTraining", "test", 1, answer)


async def keys(journal: Journal, kind: type[Row] = FaultRow) -> list[str]:
    """Keys of the rows in the journal, oldest first."""
    found = await anyio.to_thread.run_sync(journal.rows, kind)
    return [str(astuple(row)[0]) for row in found]


async def test_queued_rows_are_written_in_order(journal: GatedJournal) -> None:
    """`note` returns before the row is on disk; `serve` writes all rows; `flush` returns that none is left."""
    async_journal = AsyncJournal(journal, "run")
    for number in range(5):
        async_journal.note(fault(f"f{number}"))
    assert (async_journal.waiting, await keys(journal)) == (5, [])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(async_journal.serve)
        assert await async_journal.flush(10) == 0
        async_journal.note(replace(fault("later"), at_ns=2))
        assert await async_journal.flush(10) == 0
        tasks.cancel_scope.cancel()
    assert await keys(journal) == ["f0", "f1", "f2", "f3", "f4", "later"]
    (newest,) = await async_journal.incidents(1)
    assert newest.incident_id == "later"
    assert (await async_journal.kept_points(), async_journal.lost, async_journal.failing) == ((), 0, "")


async def test_serve_writes_rows_queued_after_a_pause(journal: GatedJournal) -> None:
    """The task waits until there is a row to write."""
    async_journal = AsyncJournal(journal, "run")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(async_journal.serve)
        for key in ("first", "second"):
            await anyio.wait_all_tasks_blocked()
            async_journal.note(fault(key))
            with anyio.fail_after(180):
                while async_journal.waiting:
                    await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()
    assert await keys(journal) == ["first", "second"]


async def test_an_emergency_is_written_first_and_dropped_last(
    journal: GatedJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that a slow disk has filled neither delays nor loses a halt."""
    monkeypatch.setattr(async_journal_module, "ROWS_MAX", 3)
    async_journal = AsyncJournal(journal, "run")
    written: list[Row] = []
    monkeypatch.setattr(journal, "put", written.append)
    halt = EmergencyRow("e", 1, "run", "halt", "tolaria", 1, "test")
    for row in (fault("f0"), halt, fault("f1"), fault("f2"), command("c0")):
        async_journal.note(row)
    assert await async_journal.flush(10) == 0
    assert written == [halt, fault("f1"), fault("f2")]


async def test_a_newer_version_replaces_the_queued_row(journal: GatedJournal) -> None:
    """An emergency cleared before it was written is one row."""
    async_journal = AsyncJournal(journal, "run")
    raised = EmergencyRow("e", 1, "run", "halt", "tolaria", 1, "test")
    async_journal.note(raised)
    async_journal.note(EmergencyRow("e", 1, "run", "halt", "tolaria", 1, "test", cleared_at_ns=7))
    assert async_journal.waiting == 1
    assert await async_journal.flush(10) == 0
    (row,) = await anyio.to_thread.run_sync(journal.rows, EmergencyRow)
    assert row.cleared_at_ns == 7


async def test_a_row_put_is_not_overwritten_by_its_older_version(journal: GatedJournal) -> None:
    """A queued row with the same key is older than the one that `put` writes."""
    async_journal = AsyncJournal(journal, "run")
    async_journal.note(EmergencyRow("e", 1, "run", "halt", "tolaria", 1, "old"))
    await async_journal.put(EmergencyRow("e", 1, "run", "halt", "tolaria", 1, "new"))
    assert async_journal.waiting == 0
    assert await async_journal.flush(10) == 0
    (row,) = await anyio.to_thread.run_sync(journal.rows, EmergencyRow)
    assert row.reason == "new"


async def test_a_full_disk_loses_nothing_and_is_reported(
    journal: GatedJournal, limit_pages: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows wait while retries become less frequent; once there is space, all are written in order."""

    def free_space(number: int) -> None:
        if number == 9:
            limit_pages(TABLE_PAGES)

    sleep = RecordedSleep(free_space)
    monkeypatch.setattr(async_journal_module, "sleep", sleep)
    async_journal = AsyncJournal(journal, "run")
    await anyio.to_thread.run_sync(limit_pages, 1)
    for number in range(3):
        async_journal.note(fault(f"f{number}"))
    seen: list[str] = []
    with capture_logs() as logs:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(async_journal.serve)
            with anyio.fail_after(180):
                while async_journal.waiting:
                    seen.append(async_journal.failing)
                    await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
    assert any("full" in why for why in seen)
    assert (async_journal.failing, async_journal.lost, await keys(journal)) == ("", 0, ["f0", "f1", "f2"])
    assert sleep.slept_s == [RETRY_S_MIN * 2**n for n in range(6)] + [RETRY_S_MAX] * 3
    assert [line["event"] for line in logs] == ["journal_failing", "journal_written_again"]


async def test_beyond_the_limit_commands_are_dropped_first(
    journal: GatedJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest rows stay, faults before commands; each lost row counts; losses are logged once a minute."""
    now_s = 100.0
    monkeypatch.setattr(async_journal_module, "ROWS_MAX", 3)
    async_journal = AsyncJournal(journal, "run", clock=lambda: now_s)
    with capture_logs() as logs:
        for row in (fault("f0"), fault("f1"), command("c0"), command("c1"), fault("f2")):
            async_journal.note(row)
        assert (async_journal.lost, async_journal.waiting) == (2, 3)
        async_journal.note(fault("f3"))
        now_s += LOG_INTERVAL_S
        async_journal.note(fault("f4"))
    assert async_journal.lost == 4
    assert [(line["rows"], line["rows_in_all"]) for line in logs] == [(1, 1), (3, 4)]
    assert await async_journal.flush(10) == 0
    assert (await keys(journal), await keys(journal, CommandRow)) == (["f2", "f3", "f4"], [])


async def test_calls_of_operators_push_out_nothing_else(journal: GatedJournal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many calls while the disk is full: they are in the log too."""
    monkeypatch.setattr(async_journal_module, "ROWS_MAX", 3)
    async_journal = AsyncJournal(journal, "run")
    async_journal.note(command("c0"))
    for number in range(5):
        async_journal.note(AdminCallRow(f"a{number}", 5, "run", "M", "q", "alice", "operator", "p", "why", 1))
    async_journal.note(command("c1"))
    assert await async_journal.flush(10) == 0
    assert await keys(journal, CommandRow) == ["c0", "c1"]
    assert await keys(journal, AdminCallRow) == ["a4"]


async def test_an_invalid_row_does_not_block_the_others(journal: GatedJournal) -> None:
    """It counts as lost."""
    async_journal = AsyncJournal(journal, "run")
    async_journal.note(FaultRow("odd", 1, "run", "test", math.inf, "stage", "x"))  # type: ignore[arg-type] # a defect
    async_journal.note(fault("good"))
    assert await async_journal.flush(10) == 0
    assert (async_journal.lost, await keys(journal)) == (1, ["good"])


async def test_flush_times_out(journal: GatedJournal, limit_pages: Callable[[int], None]) -> None:
    """A disk that stays full does not block the end of the service; the lost rows are logged."""
    async_journal = AsyncJournal(journal, "run")
    await anyio.to_thread.run_sync(limit_pages, 1)
    async_journal.note(fault("f"))
    with capture_logs() as logs:
        assert await async_journal.flush(0.05) == 1
    assert [line["rows"] for line in logs if line["event"] == "journal_rows_lost"] == [1]
    with pytest.raises(JournalUnavailableError, match="full"):
        await async_journal.put(fault("g"))


async def test_the_first_answer_counts(journal: GatedJournal) -> None:
    """A repeated request gets the first answer."""
    async_journal = AsyncJournal(journal, "run")
    assert await async_journal.find_answer("q") is None
    first = await async_journal.answer_once(action(b"first"))
    assert first == action(b"first")
    assert await async_journal.answer_once(action(b"second")) == await async_journal.find_answer("q") == first


async def test_a_cancelled_put_is_written_later(journal: GatedJournal) -> None:
    """The caller may be cancelled while the journal hangs; the row is queued."""
    async_journal = AsyncJournal(journal, "run")
    journal.gate.clear()
    with anyio.move_on_after(0.05):
        await async_journal.put(fault("a"))
    assert async_journal.waiting == 1
    journal.gate.set()
    assert await async_journal.flush(5.0) == 0
    assert await keys(journal) == ["a"]
