"""`SkippedBatches`: which batches training leaves out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from pydantic import JsonValue

from tolaria.values.training import BatchRange


@dataclass(slots=True)
class SkippedBatches:
    """Batches that training skips, as (epoch, place in the epoch from 0).

    `batches` are those in the state that was restored, where earlier versions kept them. `added` belong to the run,
    which records them, so that going back does not restore them: they are not part of the state.
    """

    batches: set[tuple[int, int]] = field(default_factory=set)
    added: set[tuple[int, int]] = field(default_factory=set)
    ranges: tuple[BatchRange, ...] = ()
    """Those that operators have named, in order; they belong to the run, too."""

    def __contains__(self, batch: tuple[int, int]) -> bool:
        return batch in self.added or batch in self.batches or (bool(self.ranges) and self._in_ranges(*batch))

    def __len__(self) -> int:
        return len(self.batches | self.added) + sum(map(len, self.ranges))

    def _in_ranges(self, epoch: int, place: int) -> bool:
        found = bisect_right(self.ranges, (epoch, place), key=lambda each: (each.epoch, each.first)) - 1
        return found >= 0 and self.ranges[found].epoch == epoch and place <= self.ranges[found].last

    def state_dict(self) -> dict[str, JsonValue]:
        """Returns the batches in order, so that equal sets have equal digests."""
        return {"batches": [[epoch, place] for epoch, place in sorted(self.batches)]}

    def load_state_dict(self, state: Mapping[str, JsonValue]) -> None:
        """Restores what `state_dict` returned. Raises KeyError, TypeError or ValueError, and is then unchanged."""
        listed = cast("list[tuple[int, int]]", state["batches"])
        self.batches = {(int(epoch), int(place)) for epoch, place in listed}
