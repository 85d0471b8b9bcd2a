"""The event loop's one door to the journal: every SQLite call runs in a worker thread, one at a time.

Owns which rows wait for the disk, and what becomes of them while it takes none. Must not know what the rows tell of.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import astuple
from typing import TYPE_CHECKING, Final, TypeVar

import anyio
import anyio.to_thread
import structlog

from tolaria.errors import JournalError
from tolaria.rollback import AdminActionRow, CommandRow

if TYPE_CHECKING:
    from tolaria.rollback import CheckpointRow, Incident, Storage
    from tolaria.rollback.journal_rows import Row

ROWS_MAX: Final = 1000
"""Rows that wait at most, some hundreds of kilobytes: hours of a full disk, as rows are written per decision."""

RETRY_S_MIN: Final = 0.5
RETRY_S_MAX: Final = 30.0
TOLD_EVERY_S: Final = 60.0
"""Time between two log lines about rows that were lost."""

_Answer = TypeVar("_Answer")
_Key = tuple[str, str]


class Archive:
    """The journal as the event loop sees it. Used on the event loop only; `serve` is a task of its own.

    Args:
        storage: open as long as this is used.
        rows_max: rows that wait at most.
        clock: monotonic seconds.
        sleep: waits that many seconds.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        rows_max: int = ROWS_MAX,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self._log = structlog.get_logger(__name__)
        self._storage = storage
        self._rows_max = rows_max
        self._clock = clock
        self._sleep = sleep
        self._one_thread = anyio.CapacityLimiter(1)
        self._writing = anyio.Lock()
        self._noted = anyio.Event()
        self._waiting: dict[_Key, Row] = {}
        """By table and key, in the order of writing. A newer version of a row takes the place of the waiting one."""
        self._told_at_s = -TOLD_EVERY_S
        self._untold = 0
        self.lost = 0
        """Rows that were noted and never written: there were more than wait at most, or a row that no table takes."""
        self.failing = ""
        """Why noted rows cannot be written at present; empty when they can."""

    @property
    def waiting(self) -> int:
        """Rows noted and not yet written."""
        return len(self._waiting)

    def note(self, row: Row) -> None:
        """Have the row written some time soon; returns at once and never raises.

        Beyond the bound the oldest row gives way, commands before all others: they are by far the most, while
        rollbacks, emergencies and faults are what somebody will look for. Of the answers to one request the first
        counts, here as in `answer_once`.
        """
        if isinstance(row, AdminActionRow):
            self._waiting.setdefault(_key(row), row)
        else:
            self._waiting[_key(row)] = row
        if len(self._waiting) > self._rows_max:
            commands = (key for key, waiting in self._waiting.items() if isinstance(waiting, CommandRow))
            del self._waiting[next(commands, next(iter(self._waiting)))]
            self._lose()
        self._noted.set()

    async def serve(self) -> None:
        """A task: write what is noted, in order, until cancelled. What the disk refuses waits and is tried again."""
        while True:
            await self._noted.wait()
            self._noted = anyio.Event()
            await self._write_all()

    async def flush(self, timeout_s: float) -> int:
        """Write what still waits, for the end; returns how many rows are left after `timeout_s`.

        May be called while `serve` runs and after it. Shield it where the caller has been cancelled.
        """
        with anyio.move_on_after(timeout_s):
            await self._write_all()
        if self._waiting:
            self._log.error("journal_rows_lost", rows=len(self._waiting), detail=self.failing or "too slow")
        return len(self._waiting)

    async def put(self, row: Row) -> None:
        """Add a row, or replace the one with its key; durable when this returns. Cancelled, it is noted for later.

        Raises:
            JournalError: it is not written, and will not be.
        """
        key = _key(row)
        older = self._waiting.get(key)
        try:
            async with self._writing:
                await self._in_thread(lambda: self._storage.journal.put(row))
                if older is not None and self._waiting.get(key) is older:
                    del self._waiting[key]
        except anyio.get_cancelled_exc_class():
            self.note(row)
            raise

    async def incidents(self, limit: int) -> tuple[Incident, ...]:
        """The newest `limit` incidents, newest first. Raises JournalError."""
        return await self._in_thread(lambda: self._storage.journal.incidents(limit))

    async def restore_points(self) -> tuple[CheckpointRow, ...]:
        """The run's committed checkpoints, oldest first. Raises JournalError."""
        return await self._in_thread(self._storage.checkpoints.restore_points)

    async def supersede_after(self, global_step: int) -> None:
        """The run has gone back to that step: its later checkpoints are not resumed from any more.

        What the journal refuses is told in the log: a crash before the next checkpoint would resume from one of them.
        """
        try:
            async with self._writing:
                await self._in_thread(lambda: self._storage.checkpoints.supersede_after(global_step))
        except JournalError as error:
            self._log.error("checkpoints_not_superseded", after_step=global_step, detail=str(error))

    async def find_answer(self, request_id: str) -> AdminActionRow | None:
        """The answer that a request got before, from this process or an earlier one. Raises JournalError."""
        waiting = self._waiting.get((AdminActionRow.table, request_id))
        if isinstance(waiting, AdminActionRow):
            return waiting
        return await self._in_thread(lambda: self._storage.journal.find(AdminActionRow, request_id))

    async def answer_once(self, row: AdminActionRow) -> AdminActionRow:
        """Record a request's answer, unless it has one: then that, which is the one to give. Raises JournalError."""
        async with self._writing:
            return await self._in_thread(lambda: self._storage.journal.answer_once(row))

    async def _write_all(self) -> None:
        retry_s = RETRY_S_MIN
        while self._waiting:
            if await self._write_first():
                retry_s = RETRY_S_MIN
            else:
                await self._sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_S_MAX)

    async def _write_first(self) -> bool:
        async with self._writing:
            if not self._waiting:
                return True
            key, row = next(iter(self._waiting.items()))
            try:
                await self._in_thread(lambda: self._write(row))
            except JournalError as error:
                self._refused(str(error))
                return False
            except ValueError as error:  # no table takes such a row: waiting would not mend it
                self._log.error("journal_row_refused", table=row.table, detail=str(error))
                self._lose()
            else:
                self._accepted()
            if self._waiting.get(key) is row:
                del self._waiting[key]
        return True

    def _write(self, row: Row) -> None:
        if isinstance(row, AdminActionRow):
            self._storage.journal.answer_once(row)
        else:
            self._storage.journal.put(row)

    def _accepted(self) -> None:
        if self.failing:
            self.failing = ""
            self._log.info("journal_written_again", rows_waiting=len(self._waiting))

    def _refused(self, why: str) -> None:
        if not self.failing:
            self._log.error("journal_failing", detail=why, rows_waiting=len(self._waiting))
        self.failing = why

    def _lose(self) -> None:
        self.lost += 1
        self._untold += 1
        now_s = self._clock()
        if now_s - self._told_at_s >= TOLD_EVERY_S:
            self._log.error("journal_rows_lost", rows=self._untold, rows_in_all=self.lost, detail=self.failing)
            self._told_at_s, self._untold = now_s, 0

    async def _in_thread(self, call: Callable[[], _Answer]) -> _Answer:
        # Abandoned when cancelled: a disk that hangs must not hold up the end of the service.
        return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._one_thread)


def _key(row: Row) -> _Key:
    return row.table, str(astuple(row)[0])
