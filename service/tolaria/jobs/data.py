"""Cursors over training data: what they have in common, and one over tensors in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from tolaria.jobs.job import Batch, CursorState


class SeededCursor:
    """A position in batches whose order is a function of the data's length, the batch size, the seed and the epoch.

    Args:
        batch_size: samples in a batch; None if a custom batch sampler decides.
        seed: the order of an epoch is a function of the seed and the epoch.
        samples: length of the data set; None if it has no length.
    """

    def __init__(self, batch_size: int | None, seed: int, samples: int | None) -> None:
        self._fixed = {"batch_size": batch_size, "seed": seed, "samples": samples}
        self._seed = seed
        self._epoch = 0
        self._index = 0
        self._saves_length = True

    def state_dict(self) -> CursorState:
        """Returns epoch (0 before the first), number of returned batches, batch size, seed and samples."""
        state: CursorState = {"epoch": self._epoch, "index": self._index, **self._fixed}
        if not self._saves_length:
            del state["samples"]
        return state

    def load_state_dict(self, state: CursorState) -> None:
        """Moves to a saved position. Reads no sample.

        A position of version 0.1.0 has no length. It stays without one until the next epoch, so that the digest of
        the restored state is the one that was saved.

        Raises:
            ValueError: it was saved with another batch size, seed or length; nothing has changed.
        """
        if "pass" in state and "data" in state:
            raise ValueError(
                "the position was saved with training.evaluate_every_steps, whose epochs are no passes over the data"
            )
        for name, value in self._fixed.items():
            if (saved := state.get(name, value)) != value:
                raise ValueError(f"the position was saved with {name} {saved!r}; this cursor has {value!r}")
        self._seek(cast("int", state["epoch"]), cast("int", state["index"]))
        self._saves_length = "samples" in state

    def _begun(self, epoch: int, index: int = 0) -> None:
        self._epoch, self._index, self._saves_length = epoch, index, True

    def _seek(self, epoch: int, index: int) -> None:
        raise NotImplementedError


class TensorCursor(SeededCursor):
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
        super().__init__(batch_size, seed, len(tensors[0]))
        self._tensors = tuple(tensors)
        self._size = batch_size
        self._chunks: tuple[Tensor, ...] = ()

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches in an epoch, including a smaller last one."""
        return -(-len(self._tensors[0]) // self._size)

    def begin_epoch(self, epoch: int) -> None:
        """Shuffles for `epoch` and moves to its first batch."""
        generator = torch.Generator().manual_seed(epoch_seed(self._seed, epoch))
        order = torch.randperm(len(self._tensors[0]), generator=generator).to(self._tensors[0].device)
        self._chunks = torch.split(order, self._size) if len(order) else ()
        self._begun(epoch)

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


def epoch_seed(seed: int, epoch: int) -> int:
    """Returns a seed of 63 bits; the odd multiplier separates (seed, epoch) pairs with equal sums."""
    return (seed * 0x9E37_79B9_7F4A_7C15 + epoch) & 0x7FFF_FFFF_FFFF_FFFF
