"""Access to the journal from the event loop: every SQLite call runs in a worker thread, one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import astuple
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeVar

import anyio
import anyio.to_thread
import structlog
from anyio import sleep

from tolaria.errors import JournalError
from tolaria.journal.rows import AdminActionRow, AdminCallRow, CommandRow, EmergencyRow

if TYPE_CHECKING:
    from tolaria.journal.database import Journal
    from tolaria.journal.rows import CheckpointRow, Incident, Row
    from tolaria.values.lineage import Lineage

ROWS_MAX: Final = 1000
"""Maximum number of queued rows: a few hundred kilobytes, enough for hours with a full disk."""

RETRY_S_MIN: Final = 0.5
RETRY_S_MAX: Final = 30.0
LOG_INTERVAL_S: Final = 60.0
"""Seconds between two log lines about lost rows."""

_RANKS: Final = MappingProxyType({AdminCallRow.table: 0, CommandRow.table: 1, EmergencyRow.table: 3})
"""How late rows of a table are dropped; 2 for all others. Calls of operators, which are in the log too, come first."""

_Answer = TypeVar("_Answer")
_Key = tuple[str, str]


class AsyncJournal:
    """The journal of one run for use on the event loop. Rows are written directly (`put`) or queued (`note`).

    Args:
        journal: must stay open while this is used.
        run_id: the run whose checkpoints are listed and superseded.
        clock: monotonic seconds, for the interval between log lines.

    Attributes:
        lost: number of rows that were queued and never written: too many waited, or no table accepts the row.
        failing: why queued rows cannot be written; empty if they can.
    """

    def __init__(self, journal: Journal, run_id: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = structlog.get_logger(__name__)
        self._journal = journal
        self._run_id = run_id
        self._clock = clock
        self._one_thread = anyio.CapacityLimiter(1)
        self._writing = anyio.Lock()
        self._noted = anyio.Event()
        self._queue: dict[_Key, Row] = {}
        """By table and key, in the order of writing. A newer version of a row replaces the queued one."""
        self._logged_at_s = -LOG_INTERVAL_S
        self._lost_since_log = 0
        self.lost = 0
        self.failing = ""

    @property
    def waiting(self) -> int:
        """Number of queued rows."""
        return len(self._queue)

    def note(self, row: Row) -> None:
        """Queues the row for writing; returns at once and never raises.

        Emergencies are written first. Beyond `ROWS_MAX` the oldest row is dropped: operators' calls before commands,
        those before all others, and emergencies last. Only the first answer to a request is kept.
        """
        if isinstance(row, AdminActionRow):
            self._queue.setdefault(_key(row), row)
        else:
            self._queue[_key(row)] = row
        if len(self._queue) > ROWS_MAX:
            del self._queue[min(self._queue, key=lambda key: _RANKS.get(key[0], 2))]
            self._count_lost()
        self._noted.set()

    async def serve(self) -> None:
        """Writes queued rows in order until cancelled. Retries failed writes."""
        while True:
            await self._noted.wait()
            self._noted = anyio.Event()
            await self._write_all()

    async def flush(self, timeout_s: float) -> int:
        """Writes the queued rows at the end, and returns the number left after `timeout_s` seconds.

        May be called while `serve` runs and after it. Shield it if the caller has been cancelled.
        """
        with anyio.move_on_after(timeout_s):
            await self._write_all()
        if self._queue:
            self._log.error("journal_rows_lost", rows=len(self._queue), detail=self.failing or "too slow")
        return len(self._queue)

    async def put(self, row: Row) -> None:
        """Adds a row, or replaces the one with its key. Durable on return; queued if cancelled.

        Raises:
            JournalError: the row is not written and will not be.
        """
        key = _key(row)
        older = self._queue.get(key)
        try:
            async with self._writing:
                await self._in_thread(lambda: self._journal.put(row))
                if older is not None and self._queue.get(key) is older:
                    del self._queue[key]
        except anyio.get_cancelled_exc_class():
            self.note(row)
            raise

    async def incidents(self, limit: int) -> tuple[Incident, ...]:
        """Returns at most `limit` incidents, newest first. Raises JournalError."""
        return await self._in_thread(lambda: self._journal.incidents(limit))

    async def admin_calls(self, limit: int) -> tuple[AdminCallRow, ...]:
        """Returns at most `limit` calls of operators, newest first, those that are queued included.

        Raises JournalError.
        """
        written = await self._in_thread(lambda: self._journal.admin_calls(limit))
        calls = {row.call_id: row for row in written}
        calls |= {row.call_id: row for row in self._queue.values() if isinstance(row, AdminCallRow)}
        return tuple(sorted(calls.values(), key=lambda row: row.at_ns, reverse=True)[:limit])

    async def kept_points(self) -> tuple[CheckpointRow, ...]:
        """Returns the run's checkpoints that can be restored, oldest first. Raises JournalError."""
        return await self._in_thread(lambda: self._journal.kept_points(self._run_id))

    async def prove(self, checkpoint_ids: Collection[str]) -> None:
        """Records that checkpoints are proven. A failure is logged: they count as unproven after a crash."""
        try:
            async with self._writing:
                for checkpoint_id in checkpoint_ids:
                    await self._in_thread(partial(self._journal.revise, checkpoint_id, proven=1))
        except JournalError as error:
            self._log.error("checkpoints_not_proven", checkpoint_ids=sorted(checkpoint_ids), detail=str(error))

    async def follow(self, lineage: Lineage, detail: str) -> int:
        """Supersedes the run's checkpoints that are not ancestors in `lineage`; returns their number.

        A failure is logged: after a crash before the next checkpoint, the run would resume from one of them.
        """
        try:
            async with self._writing:
                at_ns = time.time_ns()
                return await self._in_thread(lambda: self._journal.follow(self._run_id, lineage, detail, at_ns))
        except JournalError as error:
            self._log.error("checkpoints_not_superseded", detail=f"{detail}: {error}")
            return 0

    async def find_answer(self, request_id: str) -> AdminActionRow | None:
        """Returns the earlier answer to a request, from this process or a previous one. Raises JournalError."""
        queued = self._queue.get((AdminActionRow.table, request_id))
        if isinstance(queued, AdminActionRow):
            return queued
        return await self._in_thread(lambda: self._journal.find(AdminActionRow, request_id))

    async def answer_once(self, row: AdminActionRow) -> AdminActionRow:
        """Records a request's answer and returns the first one recorded, which is to be sent. Raises JournalError."""
        async with self._writing:
            return await self._in_thread(lambda: self._journal.answer_once(row))

    async def _write_all(self) -> None:
        retry_s = RETRY_S_MIN
        while self._queue:
            if await self._write_first():
                retry_s = RETRY_S_MIN
            else:
                await sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_S_MAX)

    async def _write_first(self) -> bool:
        """Writes the next queued row; returns whether another attempt may succeed at once, for this row or the next.

        For an emergency the reserve on the disk is given up.
        """
        async with self._writing:
            if not self._queue:
                return True
            key = max(self._queue, key=lambda key: key[0] == EmergencyRow.table)  # among equals the oldest
            row = self._queue[key]
            try:
                await self._in_thread(lambda: self._journal.put(row))
            except JournalError as error:
                if row.table == EmergencyRow.table and await self._in_thread(self._journal.reserve.give_up):
                    return True  # there is room now: once more, at once
                if not self.failing:
                    self._log.error("journal_failing", detail=str(error), rows_waiting=len(self._queue))
                self.failing = str(error)
                return False
            except ValueError as error:  # no table accepts such a row: retrying cannot succeed
                self._log.error("journal_row_refused", table=row.table, detail=str(error))
                self._count_lost()
            else:
                if self.failing:
                    self.failing = ""
                    self._log.info("journal_written_again", rows_waiting=len(self._queue))
                await self._in_thread(self._journal.reserve.keep)
            if self._queue.get(key) is row:
                del self._queue[key]
        return True

    def _count_lost(self) -> None:
        self.lost += 1
        self._lost_since_log += 1
        now_s = self._clock()
        if now_s - self._logged_at_s >= LOG_INTERVAL_S:
            self._log.error("journal_rows_lost", rows=self._lost_since_log, rows_in_all=self.lost, detail=self.failing)
            self._logged_at_s, self._lost_since_log = now_s, 0

    async def _in_thread(self, call: Callable[[], _Answer]) -> _Answer:
        # Abandoned when cancelled: a disk that hangs must not block the shutdown of the service.
        return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._one_thread)


def _key(row: Row) -> _Key:
    return row.table, str(astuple(row)[0])
