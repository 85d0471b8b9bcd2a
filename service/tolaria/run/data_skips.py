"""Data that operators have training leave out: which batches those are, and their record in the journal."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import structlog

from tolaria.errors import InvalidFieldError, LaneError, LaneLostError, WrongStateError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.database import Journal
from tolaria.journal.rows import DATA_SKIPS, CommandRow
from tolaria.lane.messages import SetSkippedRanges
from tolaria.run.lane_client import LaneClient
from tolaria.run.observers import RunObserver
from tolaria.run.status import RunStatus
from tolaria.run.step_places import StepPlaces
from tolaria.values.training import BatchRange, merged

SKIPS_MAX: Final = 1000
"""Skips of a run in all, and ranges of one of them."""

RANGES_MAX: Final = 10_000
"""Ranges of a run in all, some 500 kB in the journal."""

STEPS_MAX: Final = 100_000
"""Steps in one request."""

_PLACE_MAX: Final = 2**53

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DataSkip:
    """Batches that an operator has named, all ends included. Times are nanoseconds since 1970.

    Attributes:
        steps: the steps by which they were named; None if by their places.
        removed_at_ns: when the skip was undone; None if it holds.
    """

    skip_id: str
    at_ns: int
    reason: str
    ranges: tuple[BatchRange, ...]
    steps: tuple[int, int] | None = None
    removed_at_ns: int | None = None


class DataSkips:
    """The skips of one run. Used on the event loop only.

    They belong to the run, not to its state: going back to a restore point changes none.
    """

    def __init__(
        self,
        lane: LaneClient,
        status: RunStatus,
        journal: AsyncJournal,
        observers: RunObserver,
        *,
        saved: Sequence[DataSkip],
        places: StepPlaces,
    ) -> None:
        self._lane = lane
        self._status = status
        self._journal = journal
        self._observers = observers
        self._skips = {skip.skip_id: skip for skip in saved}
        self.places = places
        self._count()

    @property
    def all(self) -> tuple[DataSkip, ...]:
        """All skips of the run, the newest first, those that were undone included."""
        return tuple(sorted(self._skips.values(), key=lambda skip: skip.at_ns, reverse=True))

    @property
    def ranges(self) -> tuple[BatchRange, ...]:
        """The batches that are left out now, in order."""
        return merged(each for skip in self._skips.values() if skip.removed_at_ns is None for each in skip.ranges)

    def begin(self) -> None:
        """Has the lane of a run that starts in this process leave out what its earlier ones did."""
        if ranges := self.ranges:
            self._lane.submit(SetSkippedRanges(ranges))

    @property
    def _last_epoch(self) -> float:
        """The last epoch of the run, at least the present one; infinite if the run ends by steps."""
        return math.inf if self._status.steps else max(self._status.epochs, self._status.epoch)

    def ranges_of_steps(self, first: int, last: int) -> tuple[BatchRange, ...]:
        """Returns the batches of steps, as `StepPlaces.of` knows them.

        Raises InvalidFieldError, or WrongStateError before the job is built.
        """
        if not self.places.begun:
            raise WrongStateError("the job is not built yet, so that nothing is known of its steps: name batches")
        if first < 1:
            raise InvalidFieldError("from_step", "steps are counted from 1")
        if last < first:
            raise InvalidFieldError("to_step", f"must not be less than from_step, {first}, is {last}")
        if last - first >= STEPS_MAX:
            raise InvalidFieldError("to_step", f"one request names at most {STEPS_MAX} steps, these are more")
        if (end := self._status.steps) and first > end:
            raise InvalidFieldError("from_step", f"the run ends after step {end}, there is no step {first}")
        found = merged(self.places.of(step) for step in range(first, last + 1))
        if found[0].epoch > self._last_epoch:
            ends = f"the run ends after epoch {self._last_epoch}, step {first} would be in epoch {found[0].epoch}"
            raise InvalidFieldError("from_step", ends)
        if len(found) > SKIPS_MAX:
            raise InvalidFieldError("to_step", f"the steps have {len(found)} ranges of batches, at most {SKIPS_MAX}")
        return found

    def batches_of_epoch(self, epoch: int, first: int, last: int) -> tuple[BatchRange, ...]:
        """Returns batches by their places, all ends included. Raises InvalidFieldError if no epoch has the first."""
        if epoch < 1:
            raise InvalidFieldError("epoch", "is counted from 1")
        if epoch > self._last_epoch:
            raise InvalidFieldError("epoch", f"the run ends after epoch {self._last_epoch}, there is no epoch {epoch}")
        if not first <= last < _PLACE_MAX:
            raise InvalidFieldError("to_batch", f"must not be less than from_batch, {first}, is {last}")
        if (end := self.places.epoch_batches) and first >= end:
            raise InvalidFieldError("from_batch", f"an epoch has the batches 0 to {end - 1}, there is no batch {first}")
        return (BatchRange(epoch, first, last),)

    async def add(
        self, skip_id: str, reason: str, ranges: tuple[BatchRange, ...], steps: tuple[int, int] | None = None
    ) -> DataSkip:
        """Leaves batches out from the next step boundary on; durable on return. The id may be that of an equal skip.

        Raises JournalError or LaneError: then nothing has changed.
        """
        if skip_id in self._skips:
            return self._skips[skip_id]
        if len(self._skips) >= SKIPS_MAX or len(self.ranges) + len(ranges) > RANGES_MAX:
            spent = (
                f"the run has {len(self._skips)} skips of {len(self.ranges)} ranges: give it data without the batches"
            )
            raise InvalidFieldError("from_step", spent)
        skip = DataSkip(skip_id, time.time_ns(), reason, ranges, steps)
        await self._change(skip)
        return skip

    async def remove(self, skip_id: str) -> DataSkip:
        """Undoes a skip from the next step boundary on. Raises InvalidFieldError, JournalError or LaneError."""
        skip = self._skips.get(skip_id)
        if skip is None:
            known = ", ".join(each.skip_id for each in self.all if each.removed_at_ns is None) or "none"
            raise InvalidFieldError("remove", f"there is no skip {skip_id}; in force: {known}")
        if skip.removed_at_ns is None:
            skip = replace(skip, removed_at_ns=time.time_ns())
            await self._change(skip)
        return skip

    def passed(self, skip: DataSkip) -> int:
        """Returns how many of its batches training has read already: they are left out if it goes back before them."""
        epoch, place = self.places.reached
        before = ((max(0, min(each.last + 1, place) - each.first)) for each in skip.ranges if each.epoch == epoch)
        return sum(before) + sum(len(each) for each in skip.ranges if each.epoch < epoch)

    async def _change(self, skip: DataSkip) -> None:
        """Records a skip, then has the lane follow; a lane that does not is given it again when it starts."""
        before = self._skips.get(skip.skip_id)
        self._skips[skip.skip_id] = skip
        try:
            await self._journal.put(self._row())
        except BaseException:
            self._put_back(skip.skip_id, before)
            raise
        try:
            with suppress(LaneLostError):  # the next process is given them when it starts
                await self._lane.call(SetSkippedRanges(self.ranges))
        except LaneError:
            self._put_back(skip.skip_id, before)
            await self._journal.put(self._row())
            raise
        self._count()
        self._observers.on_data_skipped(skip.skip_id, skip.ranges, removed=skip.removed_at_ns is not None)

    def _put_back(self, skip_id: str, before: DataSkip | None) -> None:
        if before is None:
            self._skips.pop(skip_id, None)
        else:
            self._skips[skip_id] = before

    def _count(self) -> None:
        self._status.data_skips = sum(skip.removed_at_ns is None for skip in self._skips.values())

    def _row(self) -> CommandRow:
        status, saved = self._status, json.dumps([asdict(skip) for skip in self._skips.values()])
        return CommandRow(
            f"{DATA_SKIPS}@{status.run_id}",
            time.time_ns(),
            status.run_id,
            DATA_SKIPS,
            status.global_step,
            "applied",
            saved,
        )


def new_skip_id(request_id: str) -> str:
    """Returns the id of the skip that a request asks for: a repeat has the same."""
    return uuid.uuid5(uuid.NAMESPACE_OID, request_id).hex[:8]


def saved_skips(journal: Journal, run_id: str) -> tuple[DataSkip, ...]:
    """Returns the skips of a run. Those of a row that cannot be read are none, with an error in the log.

    Raises JournalError.
    """
    row = journal.find(CommandRow, f"{DATA_SKIPS}@{run_id}")
    try:
        return () if row is None else tuple(_skip_of(each) for each in json.loads(row.reason))
    except (KeyError, TypeError, ValueError) as error:
        _log.error("data_skips_not_read", run_id=run_id, error=f"{type(error).__name__}: {error}")
        return ()


def _skip_of(saved: dict[str, Any]) -> DataSkip:
    ranges = tuple(BatchRange(**each) for each in saved["ranges"])
    steps = None if saved["steps"] is None else (int(saved["steps"][0]), int(saved["steps"][1]))
    return DataSkip(saved["skip_id"], saved["at_ns"], saved["reason"], ranges, steps, saved["removed_at_ns"])
