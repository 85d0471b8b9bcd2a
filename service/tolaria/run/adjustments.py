"""The adjustments of learning rates that belong to the run, in the journal: a crash does not end them."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Final

import anyio
import structlog

from tolaria.errors import AdjustmentRefusedError, JournalError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.database import Journal
from tolaria.journal.rows import ADJUSTMENTS, CommandRow
from tolaria.lane.messages import ChangeOptimizer
from tolaria.run.lane_client import LaneClient
from tolaria.run.status import RunStatus
from tolaria.values.optimization import OF_THE_RUN, ActiveAdjustment, Adjustment

KEEP_S_MAX: Final = 0.25  # longest wait for the row to become durable; a disk that hangs delays no request

_log = structlog.get_logger(__name__)


class RunAdjustments:
    """Makes the adjustments of operators and the cuts that follow automatic rollbacks; keeps them in the journal.

    Used on the event loop only.
    """

    def __init__(self, lane: LaneClient, journal: AsyncJournal, status: RunStatus) -> None:
        self._lane = lane
        self._journal = journal
        self._status = status
        self._written = self._in_force()

    async def make(self, adjustment: Adjustment) -> int:
        """Adjusts learning rates at the next step boundary; returns the global step at which that took effect.

        It is durable on return, unless the journal fails: a rollback and a crash keep it in force. The adjustment of a
        request that is in force already is not made again.

        Raises AdjustmentRefusedError or UnknownGroupError: it is out of bounds or names no group; nothing has changed.
        """
        if any(each.adjustment.request_id == adjustment.request_id for each in self._in_force()):
            return self._status.global_step
        done = await self._lane.call(ChangeOptimizer(adjustment, {}, None))
        await self._keep()
        return done.global_step

    async def _keep(self) -> None:
        """Makes the adjustments in force durable, or queues them if the journal does not answer in time."""
        row, kept = self._row(), False
        try:
            with anyio.move_on_after(KEEP_S_MAX):
                await self._journal.put(row)
                kept = True
        except JournalError as error:
            _log.warning("adjustments_not_durable_yet", error=str(error))
        if not kept:
            self._journal.note(row)

    def note(self) -> None:
        """Queues the adjustments in force after a rollback, if they are others than before."""
        if self._in_force() != self._written:
            self._journal.note(self._row())

    def _in_force(self) -> list[ActiveAdjustment]:
        return [each for each in self._status.adjustments if each.adjustment.origin in OF_THE_RUN]

    def _row(self) -> CommandRow:
        status, self._written = self._status, self._in_force()
        saved = [{"at_step": each.at_step, "adjustment": asdict(each.adjustment)} for each in self._written]
        key, step = f"{ADJUSTMENTS}@{status.run_id}", status.global_step
        return CommandRow(key, time.time_ns(), status.run_id, ADJUSTMENTS, step, "applied", json.dumps(saved))


def saved_adjustments(journal: Journal, run_id: str) -> tuple[ActiveAdjustment, ...]:
    """Returns the adjustments of the run that were in force when its last process ended.

    A row that cannot be read counts as none, with an error in the log. Raises JournalError.
    """
    row = journal.find(CommandRow, f"{ADJUSTMENTS}@{run_id}")
    if row is None:
        return ()
    try:
        return tuple(
            ActiveAdjustment(Adjustment(**each["adjustment"]), int(each["at_step"])) for each in json.loads(row.reason)
        )
    except (KeyError, TypeError, ValueError, AdjustmentRefusedError) as error:
        _log.error("adjustments_not_read", run_id=run_id, error=f"{type(error).__name__}: {error}")
        return ()
