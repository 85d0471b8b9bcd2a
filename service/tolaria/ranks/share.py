"""`Share`: one rank's part of each global batch."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from tolaria.errors import BrokenJobError
from tolaria.jobs import Batch


@runtime_checkable
class SharingJob(Protocol):
    """A job that says itself how a batch is shared."""

    def share(self, batch: Batch, start: int, stop: int) -> Any:
        """Returns the payload with the samples from `start` to `stop` only."""


@dataclass(frozen=True, slots=True)
class Share:
    """The part of rank `rank` of `world`: the samples of each batch from `rank` / `world` of them on.

    So the number of ranks changes neither the order of the data nor which samples an update is computed from.
    """

    rank: int = 0
    world: int = 1
    job: object = None
    divided: bool = False
    """Whether payloads hold the samples of this rank only, as a cursor has read them."""

    def of(self, batch: Batch) -> Batch:
        """Returns this rank's samples of a batch: the batch itself if there is one rank.

        A rank for which there is none gets the first one, so that it does the same as all others; see `counted`.

        Raises:
            BrokenJobError: the payload cannot be divided.
        """
        if self.world == 1:
            return batch
        start, stop = self.bounds(batch.samples)
        if self.divided:
            payload = batch.payload
        elif isinstance(self.job, SharingJob):
            payload = self.job.share(batch, start, stop)
        else:
            payload = split_payload(batch.payload, batch.samples, start, stop)
        seed_ids = None if batch.seed_ids is None else batch.seed_ids[start:stop]
        return Batch(payload, stop - start, seed_ids)

    def bounds(self, samples: int) -> tuple[int, int]:
        """Returns the first sample of this rank in a batch of that size, and the one after the last."""
        start, stop = self.rank * samples // self.world, (self.rank + 1) * samples // self.world
        return (start, stop) if start < stop else (0, 1)

    def counted(self, batch: Batch) -> int:
        """Returns how many samples of a whole batch are this rank's; 0 if it is given one that is another rank's."""
        return (self.rank + 1) * batch.samples // self.world - self.rank * batch.samples // self.world


def split_payload(payload: Any, samples: int, start: int, stop: int) -> Any:
    """Returns some samples of a payload: of tensors and lists with one element per sample, in tuples, lists and dicts.

    A tuple of texts is a list too, as `default_collate` makes it. Numbers, texts and None belong to every sample.

    Raises:
        BrokenJobError: names the first part that is neither.
    """
    return _split(payload, samples, slice(start, stop), "payload")


def _split(payload: Any, samples: int, part: slice, name: str) -> Any:
    if isinstance(payload, (Tensor, np.ndarray)):
        if payload.ndim and len(payload) == samples:
            return payload[part]
        raise _indivisible(name, f"a tensor of shape {tuple(payload.shape)}", samples)
    if payload is None or isinstance(payload, (bool, int, float, str)):
        return payload
    if isinstance(payload, MutableMapping):
        found = copy.copy(payload)  # of its class, which may offer more than a dict
        found.update({key: _split(value, samples, part, f"{name}[{key!r}]") for key, value in payload.items()})
        return found
    if isinstance(payload, (list, tuple)):
        if len(payload) == samples and not hasattr(payload, "_fields") and not any(map(_is_part, payload)):
            if samples > 1 and all(isinstance(each, list) and len(each) == samples for each in payload):
                raise _indivisible(name, f"a list of {samples} lists of {samples} values", samples)
            return payload[part]
        values = [_split(value, samples, part, f"{name}[{n}]") for n, value in enumerate(payload)]
        return type(payload)(*values) if hasattr(payload, "_fields") else type(payload)(values)
    raise _indivisible(name, f"a {type(payload).__name__}", samples)


def _is_part(value: object) -> bool:
    """Whether such values in a list are parts of a batch, not each of one sample."""
    return isinstance(value, (Tensor, np.ndarray, MutableMapping, tuple))


def _indivisible(name: str, what: str, samples: int) -> BrokenJobError:
    return BrokenJobError(
        f"Batch.{name} is {what}, which cannot be divided among ranks: it is not clearly a tensor or a list "
        f"with one element for each of the {samples} samples; give the job a method share(batch, start, stop)"
    )
