"""Batches of a `DataLoader` over a data set with indices, from any place of an epoch on, without reading the others."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, overload

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from tolaria.jobs.data import epoch_seed
from tolaria.jobs.job import CursorState
from tolaria.jobs.randomness import HasEpoch, RandomStream, batch_seed, held_generators, seed_all
from tolaria.jobs.workers import LoaderCopy, SeededIndices, SeededItems

_REPEATABLE: Final = frozenset({RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler})
"""Samplers, by exact type, that are known to draw the same indices from equally seeded generators."""

_BATCHES_PER_LENGTH_MAX: Final = 10
_BATCHES_MORE_MAX: Final = 10_000


class IndexedBatches:
    """The batches of a `DataLoader`. Keeps the indices of the current epoch: 8 bytes a sample with torch's samplers.

    Raises ValueError if the sampler has no length, or draws other indices when it is asked for the same epoch again.
    """

    notes: tuple[str, ...] = ()
    order: str = "a function of training.seed and the epoch; a place in it is restored without reading samples"

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._loader = loader
        self._seed = seed
        self._plan = _PlannedBatches()
        persistent = bool(loader.persistent_workers)
        self._copy = LoaderCopy(loader, persistent=persistent, dataset=SeededItems(loader.dataset), batches=self._plan)
        self._order: tuple[int, Sequence[Any]] = (0, ())
        self._check()

    def read_part(self, bounds: Callable[[int], tuple[int, int]], salt: int) -> bool:
        """Reads from now on only the samples of each batch between `bounds` of its size; returns whether it can.

        Random numbers in workers are a function of `salt`, too. The numbers of samples stay those of whole batches.
        """
        if self._loader.batch_sampler is None:
            return False
        self._plan.bounds, self._plan.salt = bounds, salt
        return True

    def length(self) -> int:
        """Returns the loader's length."""
        return len(self._loader)

    def begin(self, epoch: int) -> None:
        """Does nothing: the order is drawn for the first batch."""

    def batches(self, epoch: int, index: int) -> Iterator[tuple[Any, int]]:
        """Returns batches and their numbers of samples, from batch `index` of the epoch on."""
        order = self._order_of(epoch)
        self._plan.order = order
        self._plan.start = index
        self._plan.seed, self._plan.epoch = self._seed, epoch
        return self._numbered(self._copy.open(epoch_seed(self._seed, epoch)), order, index)

    def state(self) -> CursorState | None:
        """Returns None: the position is enough."""
        return None

    def load(self, state: Any) -> None:
        """Does nothing."""

    def leave(self) -> None:
        """Ends workers that are not persistent; persistent ones go on with the next `batches`."""
        if not self._copy.persistent:
            self._copy.drop()

    def close(self) -> None:
        """Ends the workers."""
        self._copy.drop()

    def _numbered(self, batches: Iterator[Any], order: Sequence[Any], index: int) -> Iterator[tuple[Any, int]]:
        single = self._loader.batch_sampler is None
        for number, payload in enumerate(batches, index):
            yield payload, samples_of(payload) if single else len(order[number])

    def _order_of(self, epoch: int) -> Sequence[Any]:
        if self._order[0] != epoch:
            self._order = (epoch, self._drawn(epoch, None))
        return self._order[1]

    def _drawn(self, epoch: int, batches_max: int | None) -> Sequence[Any]:
        """Draws the indices of an epoch, of its first `batches_max` batches if given."""
        loader, seed = self._loader, epoch_seed(self._seed, epoch)
        holders: tuple[object, ...] = (loader, loader.sampler, loader.batch_sampler)
        for holder in holders:
            if isinstance(holder, HasEpoch):
                holder.set_epoch(epoch)
        with RandomStream(seed).active():
            seed_all(held_generators(*holders), seed)
            if loader.generator is not None:  # as DataLoader does, so that the order is the one that it would have
                torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
            return self._taken(batches_max)

    def _taken(self, batches_max: int | None) -> Sequence[Any]:
        loader = self._loader
        batch_sampler: Any = loader.batch_sampler  # a plain iterable, too
        if type(batch_sampler) is BatchSampler:
            size, drop_last = batch_sampler.batch_size, batch_sampler.drop_last
            indices = islice(batch_sampler.sampler, None if batches_max is None else batches_max * size)
            numbers = type(batch_sampler.sampler) in _REPEATABLE
            return _Chunks(array("q", indices) if numbers else list(indices), size, drop_last=drop_last)
        source = loader.sampler if batch_sampler is None else batch_sampler
        length = _length(loader)
        bound = _BATCHES_PER_LENGTH_MAX * length + _BATCHES_MORE_MAX
        taken = list(islice(source, bound + 1 if batches_max is None else batches_max))
        if len(taken) > bound:
            raise ValueError(f"the {type(source).__name__} has a length of {length}, but yields more than {bound}")
        return taken

    def _check(self) -> None:
        """Raises ValueError if an epoch cannot be drawn, or not twice."""
        loader = self._loader
        length = _length(loader)
        batch_sampler = loader.batch_sampler
        source: object = loader.sampler if batch_sampler is None else batch_sampler
        if type(batch_sampler) is BatchSampler:
            source = batch_sampler.sampler
        if type(source) in _REPEATABLE:
            return
        first, again = self._drawn(1, length), self._drawn(1, length)
        if list(first) != list(again):
            raise ValueError(
                f"the {type(source).__name__} of the DataLoader draws another order when it is asked for the same "
                "epoch again, so a position cannot be restored: its order must depend on set_epoch(), on the global "
                "random numbers or on generators in its attributes only"
            )


class _Chunks(Sequence[Any]):
    """Batches of a fixed size over indices."""

    def __init__(self, indices: Sequence[Any], size: int, *, drop_last: bool) -> None:
        self._indices = indices
        self._size = size
        self._length = len(indices) // size if drop_last else -(-len(indices) // size)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, number: int) -> list[Any]: ...

    @overload
    def __getitem__(self, number: slice) -> list[list[Any]]: ...

    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(self._length))]
        if not 0 <= number < self._length:
            raise IndexError(number)
        return list(self._indices[number * self._size : (number + 1) * self._size])


class _PlannedBatches:
    """The sampler of the copied loader: the batches of the chosen epoch, from the chosen place on, with seeds."""

    def __init__(self) -> None:
        self.order: Sequence[Any] = ()
        self.start = self.seed = self.epoch = self.salt = 0
        self.bounds: Callable[[int], tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.order) - self.start

    def __iter__(self) -> Iterator[SeededIndices]:
        order, seed, epoch = self.order, self.seed + (self.salt << 40), self.epoch
        for number in range(self.start, len(order)):
            indices = order[number]
            if self.bounds is not None:
                indices = list(indices)[slice(*self.bounds(len(indices)))]
            yield SeededIndices(batch_seed(seed, epoch, number), indices)


def samples_of(payload: Any) -> int:
    """Returns the length of the first tensor in a payload: a tensor, or a tuple, list or dict of them."""
    while not isinstance(payload, torch.Tensor):
        parts = list(payload.values()) if isinstance(payload, dict) else payload
        if not isinstance(parts, (list, tuple)) or not parts:
            raise ValueError(f"a batch must be a tensor or a tuple, list or dict of them, got {type(payload).__name__}")
        payload = parts[0]
    return len(payload)


def _length(loader: DataLoader[Any]) -> int:
    try:
        return len(loader)
    except TypeError:
        kind = type(loader.dataset).__name__
        raise ValueError(f"the dataset of the DataLoader, a {kind}, or its sampler, has no length") from None
