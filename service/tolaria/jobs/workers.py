"""Copies of a `DataLoader`, whose workers draw seeded random numbers and leave signals to the service."""

from __future__ import annotations

import copy
import mmap
import os
import signal
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tolaria import forks
from tolaria.jobs.randomness import held_generators, seed_all, seed_globals

_SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM})


@dataclass(frozen=True, slots=True)
class SeededIndices:
    """The indices of one batch (or one index, without automatic batching), and the seed of its random numbers."""

    seed: int
    indices: Any


@runtime_checkable
class _HasItems(Protocol):
    """A data set that reads a whole batch at once."""

    def __getitems__(self, indices: Any) -> Any:
        """Returns the samples of a batch."""


class SampleError(Exception):
    """A sample cannot be read; the message names its index."""


class SeededItems(Dataset[Any]):
    """A data set by `SeededIndices`. In a worker it seeds the global generators for every batch.

    In the process of training these belong to training; only generators that the data set holds itself are seeded.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._reads_batches = isinstance(dataset, _HasItems)  # a check against a protocol is slow, and batches are many
        self._held = held_generators(dataset)

    def __getitems__(self, batch: SeededIndices) -> Any:
        """Returns the samples of a batch. Raises SampleError."""
        self._seed(batch.seed)
        if self._reads_batches:
            return self._read(self.dataset.__getitems__, batch.indices, "samples")
        return [self._read(self.dataset.__getitem__, index, "sample") for index in batch.indices]

    def __getitem__(self, batch: SeededIndices) -> Any:
        """Returns one sample, or whatever the data set returns for one index. Raises SampleError."""
        self._seed(batch.seed)
        return self._read(self.dataset.__getitem__, batch.indices, "sample")

    def _seed(self, seed: int) -> None:
        seed_all(self._held, seed)
        if get_worker_info() is not None:
            seed_globals(seed)

    @staticmethod
    def _read(read: Callable[[Any], Any], index: Any, what: str) -> Any:
        try:
            return read(index)
        except Exception as error:
            text = " ".join(str(error).split())
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(frame.filename)}:{frame.lineno}"  # noqa: PTH119 - a name in a message
            raise SampleError(f"{what} {index}: {type(error).__name__}: {text} ({place})") from error


class _Leaving:
    """The flag of the current workers, a byte that is shared with forked processes: 0 until they are to end."""

    def __init__(self) -> None:
        self._flag = mmap.mmap(-1, 1)

    def renew(self) -> mmap.mmap:
        """Returns the flag of workers that start now."""
        self._flag = mmap.mmap(-1, 1)
        return self._flag

    def set(self) -> None:
        """Lets the workers end."""
        self._flag[0] = 1


class LoaderCopy:
    """A copy of a `DataLoader` with its own generator, from which torch draws the seeds of the workers.

    Args:
        loader: stays as it is.
        persistent: whether workers live on between epochs.
        dataset, batches: replace the data set and what yields the indices, if given.
    """

    def __init__(
        self, loader: DataLoader[Any], *, persistent: bool, dataset: Dataset[Any] | None = None, batches: Any = None
    ) -> None:
        self._copy = copy.copy(loader)
        self._generator = torch.Generator()
        self._init = loader.worker_init_fn
        # A DataLoader refuses assignments to its attributes, which would be too late for an iterator; here is none yet.
        changes: dict[str, Any] = {"generator": self._generator, "persistent_workers": persistent, "_iterator": None}
        if dataset is not None:
            changes["dataset"] = dataset
        if batches is not None:
            changes["sampler" if loader.batch_sampler is None else "batch_sampler"] = batches
        vars(self._copy).update(changes)
        self._leaving = _Leaving()
        weakref.finalize(self, self._leaving.set)  # at the latest when the interpreter ends

    def open(self, seed: int) -> Iterator[Any]:
        """Returns an iterator, and starts workers unless persistent ones are running."""
        self._generator.manual_seed(seed)
        variables = vars(self._copy)
        if variables["_iterator"] is None:
            variables["worker_init_fn"] = WorkerStart(self._init, os.getpid(), self._leaving.renew())
        # A worker that starts has no handlers yet.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return iter(self._copy)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def drop(self) -> None:
        """Lets the workers end; call it before the iterator is dropped."""
        self._leaving.set()
        vars(self._copy)["_iterator"] = None

    @property
    def persistent(self) -> bool:
        """Whether workers live on between epochs."""
        return bool(self._copy.persistent_workers)


class WorkerStart:
    """What a worker process does first; then it calls the user's `worker_init_fn`.

    Workers ignore SIGINT, and SIGTERM until the flag `leaving` is set: a signal to the process group or the container
    is for the service, which still needs batches to finish its step. They end with the thread that started them.

    The flag is memory that forked workers share. Spawned ones have none, and end at SIGTERM.
    """

    def __init__(self, init: Callable[[int], object] | None, parent: int, leaving: mmap.mmap | None) -> None:
        self._init = init
        self._parent = parent
        self._leaving = leaving

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_leaving": None}

    def __call__(self, worker_id: int) -> None:
        """Prepares a worker. Called in its process."""
        # Handlers, since a program that a worker starts would inherit that a signal is ignored.
        signal.signal(signal.SIGINT, _ignore)
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        forks.end_with(self._parent)
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, SeededItems):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # what the user's function expects to find there
        if self._init is not None:
            self._init(worker_id)

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._leaving is None or self._leaving[0]:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _ignore(number: int, frame: FrameType | None) -> None:
    del number, frame
