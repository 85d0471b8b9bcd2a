"""Validation batches of a `DataLoader`, which can be iterated over again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tolaria.jobs import Batch
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
