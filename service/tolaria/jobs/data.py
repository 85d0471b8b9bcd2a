"""Cursors over training data: one over tensors in memory, one over any `DataLoader`.

Owns the order of batches. Must not know what the samples are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

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
        """The epoch and how many of its batches have been given out."""
        return {"epoch": self._epoch, "index": self._index}

    def load_state_dict(self, state: CursorState) -> None:
        """Go to that place."""
        self.begin_epoch(cast("int", state["epoch"]))
        self._index = cast("int", state["index"])


class LoaderCursor:
    """Batches of a `DataLoader` that yields a tensor, or a tuple, list or dict of tensors, samples first.

    The loader must shuffle with the `generator` that it was given (or not shuffle): Tolaria seeds it for each epoch, so
    that a place can be found again. Finding one reads the epoch up to it.

    Raises:
        ValueError: when the loader shuffles without a generator of its own.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int) -> None:
        shuffles = isinstance(loader.sampler, torch.utils.data.RandomSampler)
        if shuffles and loader.generator is None:
            raise ValueError("a DataLoader that shuffles needs generator=torch.Generator() to be resumable")
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
        if self._loader.generator is not None:
            self._loader.generator.manual_seed(_epoch_seed(self._seed, epoch))
        self._batches = iter(self._loader)
        self._epoch, self._index = epoch, 0

    def next_batch(self) -> Batch | None:
        """The loader's next batch as it is; None at the end of the epoch."""
        try:
            payload = next(self._batches)
        except StopIteration:
            return None
        self._index += 1
        return Batch(payload, len(_first_tensor(payload)))

    def state_dict(self) -> CursorState:
        """The epoch and how many of its batches have been given out."""
        return {"epoch": self._epoch, "index": self._index}

    def load_state_dict(self, state: CursorState) -> None:
        """Go to that place, reading the epoch up to it."""
        self.begin_epoch(cast("int", state["epoch"]))
        while self._index < cast("int", state["index"]) and self.next_batch() is not None:
            pass


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
