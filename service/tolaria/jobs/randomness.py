"""Random numbers of data loading, apart from those of training: seeding, and private streams.

The global generators are those of torch on the CPU, of Python's `random`, and of numpy once something has imported it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset, Sampler

GeneratorObject: TypeAlias = torch.Generator | random.Random | np.random.Generator | np.random.RandomState

_States: TypeAlias = tuple[torch.Tensor, tuple[Any, ...], Any]

_NUMPY_SEED_BITS: Final = 32
_NESTING_MAX: Final = 8
"""Datasets and samplers inside one another: `Subset`, `ConcatDataset`, a sampler in a batch sampler."""


@runtime_checkable
class HasEpoch(Protocol):
    """A sampler or data set whose order depends on the epoch, as `DistributedSampler`."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch."""


def batch_seed(seed: int, epoch: int, number: int) -> int:
    """Returns a seed of 63 bits for batch `number` of an epoch (a hash, so that neighbours have nothing in common)."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{epoch}/{number}".encode()) >> 1


def seed_globals(seed: int) -> None:
    """Seeds the global generators; that of CUDA devices belongs to training and stays."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        np.random.seed(seed % 2**_NUMPY_SEED_BITS)  # noqa: NPY002 - data sets that use numpy's global generator have to be reproducible


def seed_all(generators: Iterable[GeneratorObject], seed: int) -> None:
    """Seeds generators that data sets and samplers hold themselves."""
    for generator in generators:
        match generator:
            case torch.Generator():
                generator.manual_seed(seed)
            case random.Random():  # noqa: S311 - the user's, for samples
                generator.seed(seed)
            case np.random.RandomState():
                generator.seed(seed % 2**_NUMPY_SEED_BITS)
            case np.random.Generator():
                kind = type(generator.bit_generator)
                generator.bit_generator.state = kind(seed).state


def held_generators(*holders: object) -> list[GeneratorObject]:
    """Returns the generators in the attributes of data sets and samplers, and of those inside them, once each."""
    found: dict[int, GeneratorObject] = {}
    seen: set[int] = set()
    level: list[object] = list(holders)
    for _ in range(_NESTING_MAX):
        inner: list[object] = []
        for holder in level:
            if id(holder) in seen or not hasattr(holder, "__dict__"):
                continue
            seen.add(id(holder))
            for value in vars(holder).values():
                for each in value if isinstance(value, (list, tuple)) and len(value) <= 2**10 else (value,):
                    if isinstance(each, GeneratorObject) and each is not torch.default_generator:
                        found[id(each)] = each
                    elif isinstance(each, (Dataset, Sampler)):
                        inner.append(each)
        level = inner
    return list(found.values())


class RandomStream:
    """Private global random numbers: inside `with stream.active():` the global generators are the stream's.

    Outside they are as if nothing had been drawn. Entering and leaving take about 50 us.
    """

    def __init__(self, seed: int) -> None:
        with _kept():
            seed_globals(seed)
            self._states = _states()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes the global generators the stream's while the block runs."""
        with _kept():
            _restore(self._states)
            try:
                yield
            finally:
                self._states = _states()


@contextmanager
def _kept() -> Iterator[None]:
    before = _states()
    try:
        yield
    finally:
        _restore(before)


def _states() -> _States:
    numpy_state = np.random.get_state() if "numpy" in sys.modules else None  # noqa: NPY002 - the global generator
    return torch.default_generator.get_state(), random.getstate(), numpy_state


def _restore(states: _States) -> None:
    torch_state, python_state, numpy_state = states
    torch.default_generator.set_state(torch_state)
    random.setstate(python_state)
    if numpy_state is not None:
        np.random.set_state(numpy_state)  # noqa: NPY002 - as above
