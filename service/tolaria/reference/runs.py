"""What a peer remembers, by training run, bounded. Knows nothing of what is remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

Undo = Callable[[], None]


class Revertible(Protocol):
    """Something that can go back to how it was at a step of the training."""

    def revert(self, target_step: int) -> Undo:
        """Go back to the newest state at or before `target_step`. The answer undoes that."""
        ...


T = TypeVar("T", bound=Revertible)


class Runs(Generic[T]):
    """One `T` for each run id; the run that was silent longest is forgotten first."""

    def __init__(self, create: Callable[[], T], runs_max: int = 8) -> None:
        self._create, self._runs_max = create, runs_max
        self._by_id: OrderedDict[str, T] = OrderedDict()

    def of(self, run_id: str) -> T:
        """What is remembered of a run, made where there is nothing yet."""
        if run_id not in self._by_id:
            self._by_id[run_id] = self._create()
        self._by_id.move_to_end(run_id)
        while len(self._by_id) > self._runs_max:
            self._by_id.popitem(last=False)
        return self._by_id[run_id]

    def revert(self, target_step: int) -> Undo:
        """Revert the run heard of last: a rollback's calls do not name their run."""
        if not self._by_id:
            return _nothing_to_undo
        return next(reversed(self._by_id.values())).revert(target_step)


def _nothing_to_undo() -> None:
    """No run has been heard of, so nothing was reverted."""
