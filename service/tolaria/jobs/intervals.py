"""`IntervalCursor`: epochs of a fixed number of batches, for runs that are counted in steps and for endless streams."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, cast

from tolaria.errors import EmptyDatasetError
from tolaria.jobs.job import Batch, BatchCursor, CursorState
from tolaria.jobs.loader import LoaderCursor

INTERVAL_STEPS: Final = 1000
"""Steps in an epoch of data without a length, if `training.evaluate_every_steps` does not say it."""


class IntervalCursor:
    """The batches of another cursor in epochs of `batches`; a pass over the data that ends is followed by the next one.

    An epoch may lie in two passes, or many epochs in one, as those of an endless stream do.

    Attributes:
        data: the other cursor, whose epochs are the passes over the data.
        pass_begins: spans the begin of each pass but the first of a run, on all ranks alike.
    """

    def __init__(self, data: BatchCursor, batches: int) -> None:
        self.data = data
        self.pass_begins: Callable[[], AbstractContextManager[object]] = nullcontext
        self._batches = batches
        self._pass = 0
        self._index = 0

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches in an epoch."""
        return self._batches

    def begin_epoch(self, epoch: int) -> None:  # noqa: ARG002 - the data go on
        """Begins an epoch, or the rest of one in which the run had ended; the data go on where they are."""
        if self._index >= self._batches:
            self._index = 0
        if not self._pass:
            self._begin_pass()

    def next_batch(self) -> Batch | None:
        """Returns the next batch, of the next pass if this one has no more; None at the end of the epoch.

        Raises EmptyDatasetError if the next pass has no batch either.
        """
        if self._index >= self._batches:
            return None
        batch = self.data.next_batch()
        if batch is None:
            with self.pass_begins():
                self._begin_pass()
            batch = self.data.next_batch()
        if batch is None:
            raise EmptyDatasetError(f"its training data holds no batch in pass {self._pass}")
        self._index += 1
        return batch

    def pass_over(self) -> bool:
        """Moves past the next batch without reading it; returns whether the data allow that, and have one here."""
        if self._index >= self._batches or not pass_over(self.data):
            return False
        self._index += 1
        return True

    def state_dict(self) -> CursorState:
        """Returns pass, place in the epoch, and the position in the data."""
        return {"pass": self._pass, "index": self._index, "data": self.data.state_dict()}

    def load_state_dict(self, state: CursorState) -> None:
        """Moves to a saved position. Raises ValueError if it was saved by a run that is counted in epochs."""
        if "pass" not in state or "data" not in state:
            raise ValueError(
                "the position was saved without training.evaluate_every_steps, whose epochs are passes over the data"
            )
        self.data.load_state_dict(cast("CursorState", state["data"]))
        self._pass, self._index = cast("int", state["pass"]), cast("int", state["index"])

    def _begin_pass(self) -> None:
        self._pass += 1
        self.data.begin_epoch(self._pass)


def pass_over(cursor: BatchCursor) -> bool:
    """Moves past the next batch without reading it; returns whether this cursor can do so."""
    return isinstance(cursor, LoaderCursor | IntervalCursor) and cursor.pass_over()


def loader_of(cursor: BatchCursor) -> LoaderCursor | None:
    """Returns the `LoaderCursor` that reads the data; None if another cursor does."""
    data = cursor.data if isinstance(cursor, IntervalCursor) else cursor
    return data if isinstance(data, LoaderCursor) else None
