"""Cursors over training data: one over tensors in memory, one over any `DataLoader`.

Owns the order of batches. Must not know what the samples are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import torch
from pydantic import JsonValue
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from tolaria.jobs.job import Batch, CursorState


class TensorCursor:
    """Shuffled batches of tensors that fit into memory.

    Args:
        tensors: of any dtype, on any one device, all with N as their first dimension.
        batch_size: samples in a batch; the last batch of an epoch may be smaller.
        seed: the order of an epoch is a function of the seed and the epoch alone.

    Raises:
        ValueError: when lengths differ, there are no tensors, or `batch_size` is not positive.
    """

    def __init__(self, tensors: Sequence[Tensor], *, batch_size: int, seed: int) -> None:
        if not tensors or len({len(t) for t in tensors}) != 1:
            raise ValueError(f"tensors must be of one length, got {[len(t) for t in tensors]}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._tensors = tuple(tensors)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0
        self._index = 0
        self._chunks: tuple[Tensor, ...] = ()

    @property
    def batches_per_epoch(self) -> int:
        """How many batches an epoch has, the last, smaller one counted."""
        return -(-len(self._tensors[0]) // self._batch_size)

    def begin_epoch(self, epoch: int) -> None:
        """Shuffle for `epoch` and go to its first batch."""
        generator = torch.Generator().manual_seed(_epoch_seed(self._seed, epoch))
        order = torch.randperm(len(self._tensors[0]), generator=generator).to(self._tensors[0].device)
        self._chunks = torch.split(order, self._batch_size) if len(order) else ()
        self._epoch, self._index = epoch, 0

    def next_batch(self) -> Batch | None:
        """The next batch: a tuple of tensors, each with up to `batch_size` rows; None at the end of the epoch."""
        if self._index >= len(self._chunks):
            return None
        chosen = self._chunks[self._index]
        self._index += 1
        return Batch(tuple(t[chosen] for t in self._tensors), len(chosen))

    def state_dict(self) -> CursorState:
        """The epoch (0: none has begun), how many of its batches have been given out, and what their order hangs on."""
        return {"epoch": self._epoch, "index": self._index, **self._ground()}

    def load_state_dict(self, state: CursorState) -> None:
        """Go to that place.

        Raises:
            ValueError: when it is a place among other batches: of another batch size or seed. Nothing has changed then.
        """
        _check_ground(state, self._ground())
        epoch = cast("int", state["epoch"])
        if epoch:
            self.begin_epoch(epoch)
        else:
            self._epoch, self._chunks = 0, ()
        self._index = cast("int", state["index"])

    def _ground(self) -> CursorState:
        return {"batch_size": self._batch_size, "seed": self._seed}


class LoaderCursor:
    """Batches of a `DataLoader` that yields a tensor, or a tuple, list or dict of tensors, samples first.

    The loader must go through its dataset in order, or shuffle with the `generator` that it was given: Tolaria seeds it
    for each epoch, so that a place can be found again. Finding one reads the epoch up to it.

    Raises:
        ValueError: when the dataset has no length, or the order of the batches is anybody else's.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int) -> None:
        if problem := _unrepeatable(loader):
            raise ValueError(problem)
        self._loader = loader
        self._seed = seed
        self._epoch = 0
        self._index = 0
        self._batches: Iterator[Any] = iter(())

    @property
    def batches_per_epoch(self) -> int:
        """The loader's own length."""
        return len(self._loader)

    def begin_epoch(self, epoch: int) -> None:
        """Seed the loader's generator for `epoch` and go to its first batch."""
        self._leave_epoch()
        if self._loader.generator is not None:
            self._loader.generator.manual_seed(_epoch_seed(self._seed, epoch))
        self._batches = iter(self._loader)
        self._epoch = epoch

    def next_batch(self) -> Batch | None:
        """The loader's next batch as it is; None at the end of the epoch."""
        try:
            payload = next(self._batches)
        except StopIteration:
            return None
        self._index += 1
        return Batch(payload, len(_first_tensor(payload)))

    def state_dict(self) -> CursorState:
        """The epoch (0: none has begun), how many of its batches have been given out, and what their order hangs on."""
        return {"epoch": self._epoch, "index": self._index, **self._ground()}

    def load_state_dict(self, state: CursorState) -> None:
        """Go to that place, reading the epoch up to it.

        Raises:
            ValueError: when it is a place among other batches: of another batch size or seed. Nothing has changed then.
        """
        _check_ground(state, self._ground())
        epoch = cast("int", state["epoch"])
        if not epoch:
            self._leave_epoch()
            return
        self.begin_epoch(epoch)
        while self._index < cast("int", state["index"]) and self.next_batch() is not None:
            pass

    def _leave_epoch(self) -> None:
        # An iterator has no close(): letting go of it ends its workers, before another one starts its own.
        self._batches = iter(())
        self._epoch = self._index = 0

    def _ground(self) -> CursorState:
        return {"batch_size": self._loader.batch_size, "seed": self._seed}


def _unrepeatable(loader: DataLoader[Any]) -> str:
    """Why places in the loader could not be found again; empty: they can be.

    Samplers pass by their exact type: a subclass may draw from wherever it likes.
    """
    if isinstance(loader.dataset, IterableDataset):
        return (
            "an IterableDataset has no places that can be found again: LoaderCursor needs one with a length and indices"
        )
    if loader.batch_size is None and loader.batch_sampler is not None:
        return "a batch_sampler of one's own keeps its order to itself: give batch_size and shuffle instead"
    if not isinstance(loader.dataset, Sized):
        return f"the dataset of the DataLoader, a {type(loader.dataset).__name__}, has no length"
    sampler = loader.sampler
    if type(sampler) is RandomSampler and (sampler.generator is None or sampler.generator is not loader.generator):
        return (
            "a DataLoader that shuffles needs generator=torch.Generator() to be resumable, "
            "and its RandomSampler needs the same one"
        )
    if type(sampler) not in {RandomSampler, SequentialSampler}:
        return (
            f"a {type(sampler).__name__} cannot be brought back to a place: LoaderCursor takes a loader that goes "
            "through its dataset in order, or shuffles with a generator of its own"
        )
    return ""


def _check_ground(state: CursorState, here: Mapping[str, JsonValue]) -> None:
    for name, value in here.items():
        if state.get(name) != value:
            raise ValueError(f"the place was saved with {name} {state.get(name)!r}, and this cursor has {value!r}")


def _epoch_seed(seed: int, epoch: int) -> int:
    """A seed of 63 bits; an odd multiplier keeps (seed, epoch) pairs apart that a sum would merge."""
    return (seed * 0x9E37_79B9_7F4A_7C15 + epoch) & 0x7FFF_FFFF_FFFF_FFFF


def _first_tensor(payload: Any) -> Tensor:
    while not isinstance(payload, Tensor):
        parts = list(payload.values()) if isinstance(payload, dict) else payload
        if not isinstance(parts, (list, tuple)) or not parts:
            raise ValueError(f"a batch must be a tensor or a tuple, list or dict of them, got {type(payload).__name__}")
        payload = parts[0]
    return payload
