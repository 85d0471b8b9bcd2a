from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from tolaria.errors import JournalUnavailableError
from tolaria.rollback import (
    AdminActionRow,
    CommandRow,
    EmergencyRow,
    FaultRow,
    Retention,
    Storage,
    open_storage,
)
from tolaria.rollback.journal_rows import Row
from tolaria.training.recovery.archive import RETRY_S_MAX, RETRY_S_MIN, TOLD_EVERY_S, Archive

pytestmark = pytest.mark.anyio

TABLE_PAGES = 10**6


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    """A fresh state directory."""
    storage = open_storage(tmp_path, run_id="run", retention=Retention())
    with storage.journal:
        yield storage


class Rests:
    """In place of sleeping: notes how long would have been slept, and calls what it was given."""

    def __init__(self, during: Callable[[int], None] = lambda _number: None) -> None:
        self.asked_s: list[float] = []
        self._during = during

    async def __call__(self, time_s: float) -> None:
        self.asked_s.append(time_s)
        await anyio.lowlevel.checkpoint()
        await anyio.to_thread.run_sync(self._during, len(self.asked_s))


def room_pages(storage: Storage, pages: int) -> None:
    """Let SQLite's file have that many pages and no more: beyond it says that the disk is full."""
    storage.journal._connection.execute(f"PRAGMA max_page_count = {pages}").fetchall()


async def fill(storage: Storage) -> None:
    """From now on the disk is full."""
    await anyio.to_thread.run_sync(room_pages, storage, 1)


def fault(key: str) -> FaultRow:
    """A row larger than what is left of a page."""
    return FaultRow(key, 1, "run", "test", 1, "stage", "x" * 5000)


def command(key: str) -> CommandRow:
    """A small row of the frequent kind."""
    return CommandRow(key, 1, "run", "seed", 1, "applied", "")


def action(answer: bytes) -> AdminActionRow:
    """An operator's request, answered."""
    return AdminActionRow("q", 1, "run", "PauseTraining", "test", 1, answer)


async def keys(storage: Storage, kind: type[Row] = FaultRow) -> list[str]:
    """Of the rows in the journal, oldest first."""
    found = await anyio.to_thread.run_sync(storage.journal.rows, kind)
    return [str(astuple(row)[0]) for row in found]


async def test_noted_rows_are_written_in_order_while_others_are_asked_for(storage: Storage) -> None:
    """Noting returns before anything is on disk; the task writes all; flush says that none is left."""
    archive = Archive(storage)
    for number in range(5):
        archive.note(fault(f"f{number}"))
    assert (archive.waiting, await keys(storage)) == (5, [])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(archive.serve)
        assert await archive.flush(10) == 0
        archive.note(replace(fault("later"), at_ns=2))
        assert await archive.flush(10) == 0
        tasks.cancel_scope.cancel()
    assert await keys(storage) == ["f0", "f1", "f2", "f3", "f4", "later"]
    (newest,) = await archive.incidents(1)
    assert newest.incident_id == "later"
    assert (await archive.restore_points(), archive.lost, archive.failing) == ((), 0, "")


async def test_the_task_writes_what_is_noted_after_a_pause(storage: Storage) -> None:
    """The task sleeps until there is something to write, then writes by itself."""
    archive = Archive(storage)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(archive.serve)
        for key in ("first", "second"):
            await anyio.wait_all_tasks_blocked()
            archive.note(fault(key))
            with anyio.fail_after(10):
                while archive.waiting:
                    await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()
    assert await keys(storage) == ["first", "second"]


async def test_a_newer_version_takes_the_place_of_the_waiting_one(storage: Storage) -> None:
    """An emergency cleared before it was written is one row."""
    archive = Archive(storage)
    raised = EmergencyRow("e", 1, "run", "halt", "tolaria", 1, "test")
    archive.note(raised)
    archive.note(EmergencyRow("e", 1, "run", "halt", "tolaria", 1, "test", cleared_at_ns=7))
    assert archive.waiting == 1
    assert await archive.flush(10) == 0
    (row,) = await anyio.to_thread.run_sync(storage.journal.rows, EmergencyRow)
    assert row.cleared_at_ns == 7


async def test_a_row_put_is_not_overwritten_by_its_older_version(storage: Storage) -> None:
    """What waits under the same key is older than what is put now."""
    archive = Archive(storage)
    archive.note(EmergencyRow("e", 1, "run", "halt", "tolaria", 1, "old"))
    await archive.put(EmergencyRow("e", 1, "run", "halt", "tolaria", 1, "new"))
    assert archive.waiting == 0
    assert await archive.flush(10) == 0
    (row,) = await anyio.to_thread.run_sync(storage.journal.rows, EmergencyRow)
    assert row.reason == "new"


async def test_a_full_disk_loses_nothing_and_is_told_until_there_is_space(storage: Storage) -> None:
    """Rows wait while tries come ever less often; then all are written in order and all is well."""

    def mend(number: int) -> None:
        if number == 9:
            room_pages(storage, TABLE_PAGES)

    rests = Rests(mend)
    archive = Archive(storage, sleep=rests)
    await fill(storage)
    for number in range(3):
        archive.note(fault(f"f{number}"))
    seen: list[str] = []
    with capture_logs() as logs:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(archive.serve)
            with anyio.fail_after(10):
                while archive.waiting:
                    seen.append(archive.failing)
                    await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
    assert any("full" in why for why in seen)
    assert (archive.failing, archive.lost, await keys(storage)) == ("", 0, ["f0", "f1", "f2"])
    assert rests.asked_s == [RETRY_S_MIN * 2**n for n in range(6)] + [RETRY_S_MAX] * 3
    assert [line["event"] for line in logs] == ["journal_failing", "journal_written_again"]


async def test_beyond_the_bound_commands_give_way_first_and_it_is_told_now_and_then(storage: Storage) -> None:
    """The newest rows stay, faults before commands; each lost one counts; the log hears of it once a minute."""
    now_s = 100.0
    archive = Archive(storage, rows_max=3, clock=lambda: now_s)
    with capture_logs() as logs:
        for row in (fault("f0"), fault("f1"), command("c0"), command("c1"), fault("f2")):
            archive.note(row)
        assert (archive.lost, list(archive._waiting)) == (2, [("faults", key) for key in ("f0", "f1", "f2")])
        archive.note(fault("f3"))
        now_s += TOLD_EVERY_S
        archive.note(fault("f4"))
    assert archive.lost == 4
    assert [(line["rows"], line["rows_in_all"]) for line in logs] == [(1, 1), (3, 4)]
    assert await archive.flush(10) == 0
    assert (await keys(storage), await keys(storage, CommandRow)) == (["f2", "f3", "f4"], [])


async def test_a_row_that_no_table_takes_does_not_hold_up_the_others(storage: Storage) -> None:
    """It is counted as lost, and told."""
    archive = Archive(storage)
    archive.note(FaultRow("odd", 1, "run", "test", math.inf, "stage", "x"))  # type: ignore[arg-type] # as a defect would
    archive.note(fault("good"))
    assert await archive.flush(10) == 0
    assert (archive.lost, await keys(storage)) == (1, ["good"])


async def test_flush_gives_up_in_time(storage: Storage) -> None:
    """With a disk that stays full the end of the service is not held up, and the rows lost are told."""
    archive = Archive(storage)
    await fill(storage)
    archive.note(fault("f"))
    with capture_logs() as logs:
        assert await archive.flush(0.05) == 1
    assert [line["rows"] for line in logs if line["event"] == "journal_rows_lost"] == [1]
    with pytest.raises(JournalUnavailableError, match="full"):
        await archive.put(fault("g"))


async def test_the_first_answer_counts(storage: Storage) -> None:
    """A request that comes again, or twice at once, gets the answer that it got first."""
    archive = Archive(storage)
    assert await archive.find_answer("q") is None
    first = await archive.answer_once(action(b"first"))
    assert await archive.answer_once(action(b"second")) == first == await archive.find_answer("q") == action(b"first")


async def test_a_row_that_nobody_waits_for_any_more_is_written_later(storage: Storage) -> None:
    """Whoever puts it may give up while the journal hangs; the row is not lost by that."""
    archive, held, over = Archive(storage), threading.Event(), threading.Event()

    def hold() -> None:
        with storage.journal._lock:
            held.set()
            over.wait(30)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, hold)
        await anyio.to_thread.run_sync(held.wait)
        with anyio.move_on_after(0.05):
            await archive.put(fault("a"))
        assert archive.waiting == 1
        over.set()
    assert await archive.flush(5.0) == 0
    assert await keys(storage) == ["a"]
