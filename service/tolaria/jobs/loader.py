"""`LoaderCursor`: a position in the batches of a `DataLoader`, or of another loader that keeps its own state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, Final, Protocol, cast, runtime_checkable

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from tolaria.errors import BrokenJobError
from tolaria.jobs.data import SeededCursor, epoch_seed
from tolaria.jobs.indexed import IndexedBatches, samples_of
from tolaria.jobs.job import Batch, CursorState
from tolaria.jobs.randomness import HasEpoch, RandomStream, held_generators, seed_all
from tolaria.jobs.workers import LoaderCopy, SampleError

_WORKERS_OWN: Final = "in DataLoader worker process"
"""Part of torch's message for an error that a worker has raised, and reported."""


@runtime_checkable
class HasState(Protocol):
    """A data set that keeps its own position."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the position."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a position."""


@runtime_checkable
class StatefulLoader(HasState, Protocol):
    """A loader that keeps its own position, such as torchdata's `StatefulDataLoader`."""

    def __iter__(self) -> Iterator[Any]:
        """Iterates over an epoch, or over the rest of the one whose state was loaded."""


class LoaderCursor(SeededCursor):
    """Batches of a loader, unchanged: a tensor, or a tuple, list or dict of tensors, samples first.

    A position is restored without reading samples. How, depends on the loader:

    - A `DataLoader` over a data set with indices draws the order of the epoch again and starts at the place. The order
      is a function of seed and epoch, whatever the sampler or batch sampler: the global generators, and those that it
      holds, are seeded for the epoch, and its `set_epoch` is called if it has one. In worker processes the global
      generators, and those that the data set holds, are seeded for every batch from seed, epoch and batch number.
      Without workers the data set draws from the generators of training, which are part of the training state.
    - A loader with `state_dict` and `load_state_dict`, such as torchdata's `StatefulDataLoader`, restores its state; so
      does an `IterableDataset` with both that a `DataLoader` reads without workers.
    - Any other `DataLoader` over an `IterableDataset` is read again from the start of the epoch; `notes` says so.

    Args:
        loader: the loader.
        seed: the order of an epoch is a function of the seed and the epoch.
        batches_per_epoch: ends an epoch after this number. A loader without a length needs it, unless
            `training.steps` ends the run.

    Attributes:
        notes: what the operator should know about this loader; sentences.
        order: what the order of an epoch depends on, and how a place in it is restored.
        divides: whether the loader gives each rank of a group a part of the data.

    Raises:
        ValueError: the loader has indices but no length, or its sampler does not repeat its order.
    """

    def __init__(
        self, loader: DataLoader[Any] | StatefulLoader, *, seed: int, batches_per_epoch: int | None = None
    ) -> None:
        self._source = _source_of(loader, seed)
        super().__init__(_batch_size(loader), seed, _samples(loader))
        self.notes, self.order = self._source.notes, self._source.order
        self._batches_max = batches_per_epoch
        self._length = self._source.length() if batches_per_epoch is None else batches_per_epoch
        self._batches: Iterator[tuple[Any, int]] | None = None
        self._ended = False
        samplers = (getattr(holder, "sampler", None) for holder in (loader, getattr(loader, "batch_sampler", None)))
        self.divides = any(isinstance(sampler, DistributedSampler) for sampler in samplers)
        self._has_workers = isinstance(loader, DataLoader) and loader.num_workers > 0

    @property
    def batches_per_epoch(self) -> int | None:
        """The length of the loader, or the given number; None for a loader without a length."""
        return self._length

    @property
    def is_indexed(self) -> bool:
        """Whether the loader is a `DataLoader` over a data set with indices."""
        return isinstance(self._source, IndexedBatches)

    def state_dict(self) -> CursorState:
        """Returns the position, with the state of a loader that has one."""
        loader = self._source.state()
        return super().state_dict() | ({} if loader is None else {"loader": loader, "ended": self._ended})

    def begin_epoch(self, epoch: int) -> None:
        """Moves to the first batch of `epoch`."""
        self._leave()
        self._source.begin(epoch)
        self._begun(epoch)
        self._ended = False

    def next_batch(self) -> Batch | None:
        """Returns the loader's next batch unchanged; None at the end of the epoch.

        Raises BrokenJobError, in one line, if the loader, its data set or a worker fails.
        """
        if not self._epoch or self._ended or self._index == self._batches_max:
            return None
        try:
            if self._batches is None:
                self._batches = self._source.batches(self._epoch, self._index)
            payload, samples = next(self._batches)
        except StopIteration:
            self._ended = True
            return None
        except Exception as error:
            raise BrokenJobError(
                f"training data, epoch {self._epoch}, batch {self._index}: {self._line(error)}"
            ) from error
        self._index += 1
        return Batch(payload, samples)

    def pass_over(self) -> bool:
        """Moves past the next batch without reading it; returns whether this loader can, and the epoch has one."""
        if not isinstance(self._source, IndexedBatches) or not self._epoch or self._index >= (self._length or 0):
            return False
        self._seek(self._epoch, self._index + 1)
        return True

    def read_part(self, bounds: Callable[[int], tuple[int, int]], salt: int) -> bool:
        """Reads from now on only some samples of each batch, before the first one; returns whether this loader can.

        `bounds` returns the first of them and the one after the last, for the size of a batch; `Batch.samples` stays
        the size of the whole one. Random numbers in workers are a function of `salt`, too.
        """
        exact = type(self) is LoaderCursor  # another one may look at whole batches
        return exact and isinstance(self._source, IndexedBatches) and self._source.read_part(bounds, salt)

    def close(self) -> None:
        """Ends the workers, persistent ones too."""
        self._source.close()
        self._batches = None

    def load_state_dict(self, state: CursorState) -> None:
        """Moves to a saved position. Raises ValueError as `SeededCursor.load_state_dict` does."""
        super().load_state_dict(state)
        self._source.load(state.get("loader"))
        self._ended = bool(state.get("ended"))  # not known of other loaders, which then end again

    def _seek(self, epoch: int, index: int) -> None:
        self._leave()
        self._epoch, self._index = epoch, index

    def _line(self, error: Exception) -> str:
        """Returns an error in one line. A worker's error has a traceback in its message; its last line is the error.

        When a worker dies while it passes tensors on, the connection to it ends before torch finds it dead.
        """
        text = str(error).strip().rpartition("\n")[2]
        if isinstance(error, SampleError):
            return text.removeprefix(f"{SampleError.__module__}.{SampleError.__name__}: ")
        line = f"{type(error).__name__}: {text}".removesuffix(": ")
        if self._has_workers and isinstance(error, EOFError | ConnectionError) and _WORKERS_OWN not in str(error):
            return f"a worker process of the loader has ended unexpectedly, perhaps for lack of memory ({line})"
        return line

    def _leave(self) -> None:
        # An iterator has no close(): dropping it ends its workers before another one starts its own. They have to know
        # that before.
        self._source.leave()
        self._batches = None


class _Source(Protocol):
    """The batches of one kind of loader, with the number of samples in each."""

    notes: tuple[str, ...]
    order: str

    def length(self) -> int | None:
        """Returns the batches in an epoch; None if they cannot be known."""

    def begin(self, epoch: int) -> None:
        """Prepares for the start of an epoch."""

    def batches(self, epoch: int, index: int) -> Iterator[tuple[Any, int]]:
        """Returns the batches of an epoch from `index` on."""

    def state(self) -> CursorState | None:
        """Returns the loader's own state; None if it has none."""

    def load(self, state: Any) -> None:
        """Loads what `state` returned."""

    def leave(self) -> None:
        """Ends what `batches` started."""

    def close(self) -> None:
        """Ends the workers."""


class _KeptByLoader:
    """A loader that keeps its own position."""

    notes: tuple[str, ...] = ()
    order: str = "that of the loader, which saves and restores its state"

    def __init__(self, loader: StatefulLoader, seed: int) -> None:
        self._loader = loader
        self._seed = seed
        # The state before the first epoch: the stream may start elsewhere once a batch has been taken.
        self._loaded: CursorState | None = cast("CursorState", loader.state_dict())

    def length(self) -> int | None:
        return _length(self._loader)

    def begin(self, epoch: int) -> None:
        dataset = self._loader.dataset if isinstance(self._loader, DataLoader) else self._loader
        seed_all(held_generators(self._loader), epoch_seed(self._seed, epoch))
        if isinstance(dataset, HasEpoch):
            dataset.set_epoch(epoch)

    def batches(self, epoch: int, index: int) -> Iterator[tuple[Any, int]]:
        del index  # a part of the state
        # A new iterator draws a seed. It must not take it from the generators of training: after a restore there is one
        # iterator more.
        with RandomStream(epoch_seed(self._seed, epoch)).active():
            batches = iter(self._loader)
        self._loaded = None
        return ((payload, samples_of(payload)) for payload in batches)

    def state(self) -> CursorState | None:
        # A loader may describe a position that it has just loaded in other words, under which it has another digest.
        return cast("CursorState", self._loader.state_dict()) if self._loaded is None else self._loaded

    def load(self, state: Any) -> None:
        if not isinstance(state, Mapping):
            problem = "the position was saved without the loader's state; this loader has one"
            raise ValueError(problem)  # noqa: TRY004 - the value of a position
        self._loader.load_state_dict(dict(state))
        self._loaded = cast("CursorState", dict(state))

    def leave(self) -> None:
        pass

    def close(self) -> None:
        pass


class _KeptByDataset:
    """A stream whose data set keeps its position, read in this process.

    torch's loader takes from it no more samples than the next batch needs, so that its state is that of the batch.
    """

    notes: tuple[str, ...] = ()
    order: str = "that of the stream, whose data set saves and restores its state"

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._samples = _Samples(loader.dataset)
        self._copy = LoaderCopy(loader, persistent=False, dataset=self._samples)
        self._loader = loader
        self._dataset = cast("HasState", loader.dataset)
        self._seed = seed

    def length(self) -> int | None:
        return _length(self._loader)

    def begin(self, epoch: int) -> None:
        self._samples.over = False
        seed_all(held_generators(self._dataset), epoch_seed(self._seed, epoch))
        if isinstance(self._dataset, HasEpoch):
            self._dataset.set_epoch(epoch)

    def batches(self, epoch: int, index: int) -> Iterator[tuple[Any, int]]:
        del index  # a part of the state
        if self._samples.over:
            return iter(())
        batches = self._copy.open(epoch_seed(self._seed, epoch))
        return ((payload, samples_of(payload)) for payload in batches)

    def state(self) -> CursorState | None:
        return cast("CursorState", {"dataset": dict(self._dataset.state_dict()), "over": self._samples.over})

    def load(self, state: Any) -> None:
        if not isinstance(state, Mapping) or "dataset" not in state:
            raise ValueError("the position was saved without the state of the data set; this one has one")
        self._dataset.load_state_dict(dict(state["dataset"]))
        self._samples.over = bool(state["over"])

    def leave(self) -> None:
        self._copy.drop()

    def close(self) -> None:
        self._copy.drop()


class _Samples(IterableDataset[Any]):
    """The samples of a data set; `over` once it has no more, which it may not know after its last one."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.over = False

    def __iter__(self) -> Iterator[Any]:
        yield from self._dataset
        self.over = True


class _ReadAgain:
    """A stream without state: restoring a position reads the epoch up to it."""

    order: str = "that of the stream, of which an epoch is read again to restore a place in it"

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._loader = loader
        self._copy = LoaderCopy(loader, persistent=False)
        self._seed = seed
        kind = type(loader.dataset).__name__
        kept = isinstance(loader.dataset, HasState)
        missing = f"its state is in {loader.num_workers} worker processes" if kept else "it has no state"
        note = (
            f"the training data are a stream ({kind}), and {missing}: restoring a position, after each rollback and "
            "start, reads the epoch again up to it (without a length: all that was read before); torchdata's "
            "StatefulDataLoader, with a state_dict of the data set, avoids that"
        )
        self.notes: tuple[str, ...] = (note,)

    def length(self) -> int | None:
        return _length(self._loader)

    def begin(self, epoch: int) -> None:
        pass

    def batches(self, epoch: int, index: int) -> Iterator[tuple[Any, int]]:
        if isinstance(self._loader.dataset, HasEpoch):
            self._loader.dataset.set_epoch(epoch)
        seed = epoch_seed(self._seed, epoch)
        seed_all(held_generators(self._loader.dataset), seed)
        stream = RandomStream(seed)
        with stream.active():
            batches = self._copy.open(seed)
        return self._read(batches, stream, index)

    def state(self) -> CursorState | None:
        return None

    def load(self, state: Any) -> None:
        pass

    def leave(self) -> None:
        self._copy.drop()

    def close(self) -> None:
        self._copy.drop()

    @staticmethod
    def _read(batches: Iterator[Any], stream: RandomStream, index: int) -> Iterator[tuple[Any, int]]:
        number, end = 0, object()
        while True:
            with stream.active():
                payload = next(batches, end)
            if payload is end:
                return
            if number >= index:
                yield payload, samples_of(payload)
            number += 1


def _source_of(loader: object, seed: int) -> _Source:
    """Returns the batches of a loader. Raises ValueError if there is no way to repeat them."""
    indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    stateful = isinstance(loader, StatefulLoader)
    if isinstance(loader, DataLoader) and indexed and not (stateful and isinstance(loader.dataset, HasState)):
        return IndexedBatches(loader, seed)
    if isinstance(loader, StatefulLoader):
        return _KeptByLoader(loader, seed)
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, HasState) and not loader.num_workers:
        return _KeptByDataset(loader, seed)
    if isinstance(loader, DataLoader):
        return _ReadAgain(loader, seed)
    raise ValueError(
        f"a {type(loader).__name__} is neither a DataLoader, nor a loader with __iter__, state_dict and load_state_dict"
    )


def _batch_size(loader: object) -> int | None:
    return loader.batch_size if isinstance(loader, DataLoader) else None


def _samples(loader: object) -> int | None:
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return len(loader.dataset) if isinstance(loader.dataset, Sized) else None
    return None


def _length(loader: object) -> int | None:
    try:
        return len(cast("Sized", loader))
    except TypeError:
        return None
