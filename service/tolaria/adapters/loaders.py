"""Batches of loaders with their places, for training and for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tolaria.jobs import Batch, LoaderCursor
from tolaria.jobs.indexed import samples_of


@dataclass(frozen=True, slots=True)
class LoaderBatches:
    """The batches of a loader, each as `payload_of` its place makes it of what the loader gives."""

    loader: Iterable[Any]
    payload_of: Callable[[Any, int], Any]

    def __iter__(self) -> Iterator[Batch]:
        """Reads the loader from its start."""
        for place, given in enumerate(self.loader):
            yield Batch(self.payload_of(given, place), samples_of(given))


class PlacedCursor(LoaderCursor):
    """Adds to each payload its place in the epoch, `batch_idx` in Lightning."""

    @property
    def epoch(self) -> int:
        """The epoch, from 1; 0 before the first."""
        return self._epoch

    def next_batch(self) -> Batch | None:
        """Returns the next batch with a payload of (batch, place)."""
        place = self._index
        batch = super().next_batch()
        return None if batch is None else Batch((batch.payload, place), batch.samples)
