"""Cursors over training data: one over tensors in memory, one over a `DataLoader`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from tolaria.jobs.job import Batch, CursorState


class _SeededCursor:
    """A position in batches whose order is a function of the batch size, the seed and the epoch."""

    def __init__(self, batch_size: int | None, seed: int) -> None:
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0
        self._index = 0

    def state_dict(self) -> CursorState:
        """Returns epoch (0 before the first), number of returned batches, batch size and seed."""
        return {"epoch": self._epoch, "index": self._index, "batch_size": self._batch_size, "seed": self._seed}

    def load_state_dict(self, state: CursorState) -> None:
        """Moves to a saved position.

        Raises:
            ValueError: it was saved with another batch size or seed; nothing has changed.
        """
        for name, value in (("batch_size", self._batch_size), ("seed", self._seed)):
            if state.get(name) != value:
                raise ValueError(f"the position was saved with {name} {state.get(name)!r}; this cursor has {value!r}")
        self._seek(cast("int", state["epoch"]), cast("int", state["index"]))

    def _seek(self, epoch: int, index: int) -> None:
        raise NotImplementedError


class TensorCursor(_SeededCursor):
    """Shuffled batches of tensors in memory.

    Args:
        tensors: of any dtype, on one device, all with N as their first dimension.
        batch_size: samples in a batch; the last batch of an epoch may be smaller.
        seed: the order of an epoch is a function of the seed and the epoch.

    Raises:
        ValueError: lengths differ, there are no tensors, or `batch_size` is not positive.
    """

    def __init__(self, tensors: Sequence[Tensor], *, batch_size: int, seed: int) -> None:
        if len({len(t) for t in tensors}) != 1:
            raise ValueError(f"tensors must have one length, got {[len(t) for t in tensors]}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        super().__init__(batch_size, seed)
        self._tensors = tuple(tensors)
        self._size = batch_size
        self._chunks: tuple[Tensor, ...] = ()

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches in an epoch, including a smaller last one."""
        return -(-len(self._tensors[0]) // self._size)

    def begin_epoch(self, epoch: int) -> None:
        """Shuffles for `epoch` and moves to its first batch."""
        generator = torch.Generator().manual_seed(_epoch_seed(self._seed, epoch))
        order = torch.randperm(len(self._tensors[0]), generator=generator).to(self._tensors[0].device)
        self._chunks = torch.split(order, self._size) if len(order) else ()
        self._epoch, self._index = epoch, 0

    def next_batch(self) -> Batch | None:
        """Returns a tuple of tensors, each with up to `batch_size` rows; None at the end of the epoch."""
        if self._index >= len(self._chunks):
            return None
        chosen = self._chunks[self._index]
        self._index += 1
        return Batch(tuple(t[chosen] for t in self._tensors), len(chosen))

    def _seek(self, epoch: int, index: int) -> None:
        if epoch:
            self.begin_epoch(epoch)
        else:
            self._epoch, self._chunks = 0, ()
        self._index = index


class LoaderCursor(_SeededCursor):
    """Batches of a `DataLoader` that yields a tensor, or a tuple, list or dict of tensors, samples first.

    To be resumable, the loader reads its dataset in order, or shuffles it with the loader's own `generator`, which
    Tolaria seeds for each epoch. Restoring a position reads the epoch up to it.

    Raises:
        ValueError: the dataset has no length, or the order of the batches cannot be repeated.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int) -> None:
        if problem := _order_problem(loader):
            raise ValueError(problem)
        super().__init__(loader.batch_size, seed)
        self._loader = loader
        self._batches: Iterator[Any] = iter(())

    @property
    def batches_per_epoch(self) -> int:
        """The length of the loader."""
        return len(self._loader)

    def begin_epoch(self, epoch: int) -> None:
        """Seeds the loader's generator for `epoch` and moves to its first batch."""
        self._leave_epoch()
        if self._loader.generator is not None:
            self._loader.generator.manual_seed(_epoch_seed(self._seed, epoch))
        self._batches = iter(self._loader)
        self._epoch = epoch

    def next_batch(self) -> Batch | None:
        """Returns the loader's next batch unchanged; None at the end of the epoch."""
        try:
            payload = next(self._batches)
        except StopIteration:
            return None
        self._index += 1
        return Batch(payload, len(_first_tensor(payload)))

    def _seek(self, epoch: int, index: int) -> None:
        if not epoch:
            self._leave_epoch()
            return
        self.begin_epoch(epoch)
        while self._index < index and self.next_batch() is not None:
            pass

    def _leave_epoch(self) -> None:
        # An iterator has no close(): dropping it ends its workers before another one starts its own.
        self._batches = iter(())
        self._epoch = self._index = 0


def _order_problem(loader: DataLoader[Any]) -> str | None:
    """Returns why the order of batches cannot be repeated; None if it can."""
    sampler = loader.sampler
    if isinstance(loader.dataset, IterableDataset):
        return (
            "LoaderCursor needs a dataset with a length and indices: a position in an IterableDataset is not resumable"
        )
    if loader.batch_size is None and loader.batch_sampler is not None:
        return "the order of a custom batch_sampler cannot be restored: use batch_size and shuffle instead"
    if not isinstance(loader.dataset, Sized):
        return f"the dataset of the DataLoader, a {type(loader.dataset).__name__}, has no length"
    if type(sampler) is RandomSampler and (sampler.generator is None or sampler.generator is not loader.generator):
        return (
            "a DataLoader that shuffles needs generator=torch.Generator() to be resumable, "
            "and its RandomSampler needs the same one"
        )
    if type(sampler) not in {RandomSampler, SequentialSampler}:  # exact types: a subclass may have another order
        return (
            f"the order of a {type(sampler).__name__} cannot be restored: LoaderCursor needs a loader that reads its "
            "dataset in order, or shuffles it with its own generator"
        )
    return None


def _epoch_seed(seed: int, epoch: int) -> int:
    """Returns a seed of 63 bits; the odd multiplier separates (seed, epoch) pairs with equal sums."""
    return (seed * 0x9E37_79B9_7F4A_7C15 + epoch) & 0x7FFF_FFFF_FFFF_FFFF


def _first_tensor(payload: Any) -> Tensor:
    while not isinstance(payload, Tensor):
        parts = list(payload.values()) if isinstance(payload, dict) else payload
        if not isinstance(parts, (list, tuple)) or not parts:
            raise ValueError(f"a batch must be a tensor or a tuple, list or dict of them, got {type(payload).__name__}")
        payload = parts[0]
    return payload
