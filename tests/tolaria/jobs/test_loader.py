from __future__ import annotations

import json
import os
import random
import re
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchdata.stateful_dataloader import StatefulDataLoader

from tolaria.errors import BrokenJobError
from tolaria.jobs import BatchCursor, LoaderCursor
from tolaria.jobs.workers import LoaderCopy

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's own
N = 24


class Noisy(Dataset[torch.Tensor]):
    """Index, process and random numbers of every kind, as an augmentation draws them. Counts what was read here."""

    def __init__(self, item_s: float = 0.0, bad: int = -1) -> None:
        self.own = np.random.default_rng(0)
        self.item_s = item_s
        self.bad = bad
        self.read = 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.bad:
            raise RuntimeError(f"corrupt\nfile {index}")
        time.sleep(self.item_s)
        self.read += 1
        drawn = [torch.rand(()).item(), random.random(), np.random.rand(), self.own.random()]
        return torch.tensor([float(index), *drawn], dtype=torch.float64)


class Lazy(Sampler[int]):
    """Draws from the global generators and one of its own, one index at a time."""

    def __init__(self) -> None:
        self.own = random.Random(0)

    def __iter__(self) -> Iterator[int]:
        for _ in range(N):
            yield (int(torch.randint(N, ())) + random.randrange(N) + self.own.randrange(N)) % N

    def __len__(self) -> int:
        return N


class ByEpoch(Sampler[int]):
    """Another order for each epoch, which it has to be given."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(index + self.epoch) % N for index in range(N)])

    def __len__(self) -> int:
        return N


class Counting(ByEpoch):
    """Counts its epochs itself, so that the order depends on how often it was asked."""

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        pass


class Unequal(Sampler[list[int]]):
    """A batch sampler whose batches differ in size and number."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(N).tolist()
        while order:
            size = 1 + int(torch.randint(5, ()))
            yield order[:size]
            order = order[size:]

    def __len__(self) -> int:
        return N // 3


def shuffling(**options: Any) -> DataLoader[Any]:
    """A shuffling loader."""
    return DataLoader(Noisy(), batch_size=4, shuffle=True, **options)


DATA = Noisy()
LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": lambda: DataLoader(Noisy(), batch_size=4),
    "shuffling, with a generator": lambda: shuffling(generator=torch.Generator()),
    "shuffling, without a generator": shuffling,
    "drop_last": lambda: DataLoader(Noisy(), batch_size=5, shuffle=True, drop_last=True),
    "with replacement": lambda: DataLoader(Noisy(), 4, sampler=RandomSampler(DATA, replacement=True)),
    "weighted": lambda: DataLoader(Noisy(), 4, sampler=WeightedRandomSampler([1.0 + i for i in range(N)], N)),
    "subset": lambda: DataLoader(Noisy(), 4, sampler=SubsetRandomSampler(range(9), torch.Generator())),
    "a list": lambda: DataLoader(Noisy(), 4, sampler=list(range(5, 20))),
    "lazy": lambda: DataLoader(Noisy(), 4, sampler=Lazy()),
    "by epoch": lambda: DataLoader(Noisy(), 4, sampler=ByEpoch()),
    "batches of unequal size": lambda: DataLoader(Noisy(), batch_sampler=Unequal()),
    "torch's batch sampler": lambda: DataLoader(
        Noisy(), batch_sampler=BatchSampler(RandomSampler(DATA, generator=torch.Generator()), 4, drop_last=False)
    ),
    "collate_fn": lambda: shuffling(collate_fn=lambda samples: {"x": torch.stack(samples) + torch.rand(())}),
    "without batches": lambda: DataLoader(Noisy(), batch_size=None, sampler=SequentialSampler(DATA)),
    "torchdata's": lambda: StatefulDataLoader(Noisy(), batch_size=4, shuffle=True),
}


def content(payload: Any) -> Any:
    """The numbers in a payload."""
    return {name: value.tolist() for name, value in payload.items()} if isinstance(payload, dict) else payload.tolist()


def taken(cursor: BatchCursor, batches: int = 1000) -> list[Any]:
    """The next batches of the epoch."""
    found: list[Any] = []
    while len(found) < batches and (batch := cursor.next_batch()) is not None:
        found.append(content(batch.payload))
    return found


def saved(cursor: BatchCursor) -> Any:
    """The position as a checkpoint keeps it."""
    return json.loads(json.dumps(cursor.state_dict()))


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_a_position_is_restored_without_reading(make: Callable[[], DataLoader[Any]]) -> None:
    """Whatever the sampler. The data draw from the generators of training, which the training state restores."""
    cursor = LoaderCursor(make(), seed=3)
    cursor.begin_epoch(2)
    taken(cursor, 2)
    state, generators = saved(cursor), (torch.get_rng_state(), random.getstate(), np.random.get_state())
    rest = taken(cursor)
    loader = make()
    dataset: Any = loader.dataset
    others = LoaderCursor(loader, seed=3)
    for each in (cursor, others):
        before = dataset.read
        each.load_state_dict(state)
        assert dataset.read == before
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        np.random.set_state(generators[2])
        first = taken(each, 1)
        assert first == rest[:1]
        assert each is cursor or dataset.read <= before + 5
        assert first + taken(each) == rest
    assert len(rest) >= 1


@pytest.mark.parametrize("name", ["shuffling, without a generator", "lazy", "by epoch", "batches of unequal size"])
def test_orders_depend_on_seed_and_epoch_alone(name: str) -> None:
    """They do not depend on the global generators, nor change them."""

    def order(seed: int, epoch: int) -> list[Any]:
        cursor = LoaderCursor(LOADERS[name](), seed=seed)
        torch.rand(3)
        cursor.begin_epoch(epoch)
        before = torch.get_rng_state(), random.getstate()
        cursor.next_batch()
        found = [[sample[0] for sample in batch] for batch in taken(cursor)]
        drawn = torch.equal(torch.get_rng_state(), before[0])
        assert not drawn  # by the augmentation
        return found

    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2)


def test_an_order_draws_nothing_from_the_global_generators() -> None:
    """Training that draws from them is the same with and without a shuffling loader."""
    cursor = LoaderCursor(DataLoader(TensorDataset(torch.arange(9)), 2, sampler=Lazy9()), seed=1)
    before = torch.get_rng_state(), random.getstate(), numpy_words()
    for epoch in (1, 2):
        cursor.begin_epoch(epoch)
        while cursor.next_batch() is not None:
            pass
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert numpy_words() == before[2]


def numpy_words() -> list[int]:
    """The state of numpy's global generator."""
    state: Any = np.random.get_state()
    words: list[int] = state[1].tolist()
    return words


class Lazy9(Lazy):
    """Nine indices."""

    def __iter__(self) -> Iterator[int]:
        return (index % 9 for index in super().__iter__())


def test_the_numbers_of_samples_are_those_of_the_batches() -> None:
    """Also with a custom batch sampler, and with a payload that is no tensor."""
    cursor = LoaderCursor(DataLoader(Noisy(), batch_sampler=Unequal(), collate_fn=lambda s: {"n": [len(s)]}), seed=1)
    cursor.begin_epoch(1)
    sizes = []
    while (batch := cursor.next_batch()) is not None:
        assert batch.payload == {"n": [batch.samples]}
        sizes.append(batch.samples)
    assert sum(sizes) == N


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: DataLoader(Noisy(), 4, sampler=Counting()), "the Counting of the DataLoader draws another order"),
        (lambda: DataLoader(Noisy(), 4, sampler=iter(range(5))), "no length"),
        (lambda: DataLoader(Endless()), "no length"),
        (lambda: [1, 2], "neither a DataLoader"),
    ],
)
def test_a_loader_that_cannot_be_repeated_is_refused(made: Callable[[], Any], words: str) -> None:
    """At the start, with the reason."""
    with pytest.raises(ValueError, match=words):
        LoaderCursor(made(), seed=0)


class Endless(Dataset[int]):
    """Samples by index, without a length."""

    def __getitem__(self, index: int) -> int:
        return index


def test_a_sampler_without_an_end_is_refused() -> None:
    """It yields many times more batches than its length."""
    cursor = LoaderCursor(DataLoader(Noisy(), batch_sampler=Infinite()), seed=0)
    cursor.begin_epoch(1)
    with pytest.raises(BrokenJobError, match="the Infinite has a length of 8, but yields more than"):
        cursor.next_batch()


class Infinite(Unequal):
    """One batch again and again."""

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield [0]


class CountingLoader(DataLoader[Any]):
    """Counts its live iterators, which keep their workers alive, whenever it makes another one."""

    made: ClassVar[list[weakref.ref[Any]]] = []
    alive_at_making: ClassVar[list[int]] = []

    def __iter__(self) -> Any:
        self.alive_at_making.append(self.alive)
        iterator = super().__iter__()
        self.made.append(weakref.ref(iterator))
        return iterator

    @property
    def alive(self) -> int:
        return sum(ref() is not None for ref in self.made)


def test_an_unfinished_epoch_ends_before_the_next_begins() -> None:
    """The iterator of an epoch, and with it its workers, is dropped before another one is made."""
    watched = CountingLoader(TensorDataset(torch.arange(10)), batch_size=3)
    cursor = LoaderCursor(watched, seed=0)
    before = cursor.state_dict()
    for epoch in (1, 2):
        cursor.begin_epoch(epoch)
        cursor.next_batch()
    cursor.load_state_dict(cursor.state_dict())
    assert watched.alive == 0
    cursor.next_batch()
    assert watched.alive_at_making == [0, 0, 0]
    assert watched.alive == 1
    cursor.load_state_dict(before)
    assert watched.alive == 0


# -- workers -----------------------------------------------------------------------------------------------------------


def in_workers(**options: Any) -> LoaderCursor:
    """A shuffling, augmenting loader with two workers."""
    dataset = Noisy(options.pop("item_s", 0.0), options.pop("bad", -1))
    return LoaderCursor(DataLoader(dataset, batch_size=4, shuffle=True, num_workers=2, **options), seed=3)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_repeat_their_augmentation_from_any_place(persistent: bool) -> None:
    """Bit by bit, in the same cursor and in another one, without a change to the generators of training."""
    cursor = in_workers(persistent_workers=persistent)
    other = in_workers(persistent_workers=not persistent)
    before = torch.get_rng_state()
    cursor.begin_epoch(1)
    taken(cursor, 2)
    state = saved(cursor)
    rest = taken(cursor)
    assert len(rest) == 4
    cursor.load_state_dict(state)
    assert taken(cursor, 1) == rest[:1]
    cursor.load_state_dict(state)
    assert taken(cursor) == rest
    other.load_state_dict(state)
    assert taken(other) == rest
    assert len({sample[1] for batch in rest for sample in batch}) == 16  # no two samples have equal numbers
    cursor.begin_epoch(2)
    assert taken(cursor, 6)[2:] != rest
    assert torch.equal(torch.get_rng_state(), before)
    cursor.close()
    other.close()


def _look_at_dataset(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, Noisy)
    info.dataset.item_s = worker_id / 1000


def test_the_users_worker_init_fn_finds_its_data_set() -> None:
    """`get_worker_info().dataset` is the user's own data set."""
    cursor = in_workers(worker_init_fn=_look_at_dataset)
    cursor.begin_epoch(1)
    assert len(taken(cursor)) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_raises_is_named_in_one_line(workers: int) -> None:
    """With its index, the error, and the place in the user's code."""
    dataset = Noisy(bad=13)
    cursor = LoaderCursor(DataLoader(dataset, batch_size=4, num_workers=workers), seed=0)
    cursor.begin_epoch(1)
    assert len(taken(cursor, 3)) == 3
    with pytest.raises(BrokenJobError) as raised:
        cursor.next_batch()
    named = r"training data, epoch 1, batch 3: sample 13: RuntimeError: corrupt file 13 \(test_loader.py:\d+\)"
    assert re.fullmatch(named, str(raised.value))


def children() -> set[int]:
    """The child processes of this one."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_service(number: signal.Signals) -> None:
    """A signal to the process group does not end them: the service needs batches to finish its step."""
    before = children()
    cursor = in_workers(item_s=0.001)
    cursor.begin_epoch(1)
    taken(cursor, 1)
    for pid in children() - before:
        os.kill(pid, number)
    assert len(taken(cursor)) == 5
    cursor.close()


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_know_that_they_may_end_before_their_iterator_is_dropped(
    persistent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one that reads a long sample ignores the SIGTERM that torch sends after five seconds."""
    before = children()
    alive: list[int] = []
    drop = LoaderCopy.drop

    def counting(copy: LoaderCopy) -> None:
        alive.append(len(children() - before))
        drop(copy)

    monkeypatch.setattr(LoaderCopy, "drop", counting)
    cursor = in_workers(persistent_workers=persistent)
    cursor.begin_epoch(1)
    alive.clear()
    taken(cursor, 1)
    cursor.close()
    assert alive[0] == 2
    assert children() == before


def test_a_dead_worker_is_named_in_one_line() -> None:
    """The reason has the worker's id."""
    before = children()
    cursor = in_workers(item_s=0.01, prefetch_factor=1)
    cursor.begin_epoch(1)
    taken(cursor, 1)
    dead = children() - before
    for pid in dead:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(BrokenJobError, match=r"worker \(pid.*") as raised:
        taken(cursor)
    assert "\n" not in str(raised.value)
    assert any(str(pid) in str(raised.value) for pid in dead)


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (EOFError, "(EOFError)"),
        (ConnectionResetError, "(ConnectionResetError)"),
    ],
)
def test_a_worker_that_dies_while_it_passes_tensors_on_is_named(
    error: type[Exception], ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch then raises the bare error of the connection, if it does not find the worker dead yet."""
    cursor = in_workers()
    cursor.begin_epoch(1)
    taken(cursor, 1)

    def broken(_: object) -> None:
        raise error

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_next_data", broken)
    with pytest.raises(BrokenJobError, match="a worker process of the loader has ended unexpectedly") as raised:
        taken(cursor)
    assert str(raised.value).endswith(ending)
    cursor.close()


class Unreadable(IterableDataset[torch.Tensor]):
    """Its file is too short."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        raise EOFError("short file")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_sets_own_end_of_file_is_no_dead_worker(workers: int) -> None:
    """The error is reported as it is."""
    loader = DataLoader(Unreadable(), batch_size=3, num_workers=workers)
    cursor = LoaderCursor(loader, seed=0, batches_per_epoch=2)
    cursor.begin_epoch(1)
    with pytest.raises(BrokenJobError, match=r"batch 0: EOFError: .*short file$"):
        cursor.next_batch()
    cursor.close()


# -- streams -----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[torch.Tensor]):
    """Eighteen samples with random numbers, shared among the workers; counts what was read here."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, 18, step):
            self.read += 1
            yield torch.tensor([float(index), torch.rand(()).item(), random.random()], dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"num_workers": 2, "persistent_workers": True}])
def test_a_stream_without_state_is_read_again(options: dict[str, Any]) -> None:
    """Its samples and random numbers repeat; the restore itself reads nothing; a note says so."""

    def new() -> LoaderCursor:
        return LoaderCursor(DataLoader(Stream(), batch_size=3, **options), seed=5, batches_per_epoch=6)

    cursor, other = new(), new()
    assert cursor.batches_per_epoch == 6
    (note,) = cursor.notes
    assert "reads the epoch again" in note
    before = torch.get_rng_state(), random.getstate()
    cursor.begin_epoch(1)
    taken(cursor, 2)
    state = saved(cursor)
    rest = taken(cursor)
    assert len(rest) == 4
    for each in (cursor, other):
        each.load_state_dict(state)
        assert taken(each) == rest
    assert (torch.equal(torch.get_rng_state(), before[0]), random.getstate() == before[1]) == (True, True)


def test_a_stream_without_a_length_has_none() -> None:
    """An epoch of it then ends with the stream, unless something else counts."""
    cursor = LoaderCursor(DataLoader(Stream(), batch_size=3), seed=5)
    assert cursor.batches_per_epoch is None
    cursor.begin_epoch(1)
    assert len(taken(cursor)) == 6


def test_an_epoch_of_an_endless_stream_ends_after_the_given_batches() -> None:
    """The next epoch begins the stream again."""
    cursor = LoaderCursor(DataLoader(Stream(), batch_size=3), seed=5, batches_per_epoch=2)
    for epoch in (1, 2):
        cursor.begin_epoch(epoch)
        assert [[sample[0] for sample in batch] for batch in taken(cursor)] == [[0, 1, 2], [3, 4, 5]]


class Remembering(IterableDataset[torch.Tensor]):
    """A stream with state, as torchdata's loader expects it; counts what was read here."""

    def __init__(self) -> None:
        self.at = self.read = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < 18:
            self.at += 1
            self.read += 1
            yield torch.tensor([self.at])
        self.at = 0

    def __len__(self) -> int:
        return 18

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stateful_loader_restores_its_own_state(workers: int) -> None:
    """Torchdata's StatefulDataLoader as it is: nothing is read again, and the state read back is the one loaded."""

    def new() -> tuple[Remembering, LoaderCursor]:
        dataset = Remembering()
        loader = StatefulDataLoader(dataset, batch_size=3, num_workers=workers)
        return dataset, LoaderCursor(loader, seed=5)

    _, cursor = new()
    untouched = saved(cursor)
    cursor.begin_epoch(1)
    assert taken(cursor, 2) == [[[1], [2], [3]], [[4], [5], [6]]]
    state = saved(cursor)
    rest = taken(cursor)
    assert [batch[0] for batch in rest] == [[7], [10], [13], [16]]
    ended = saved(cursor)
    dataset, other = new()
    for each in (cursor, other):
        each.load_state_dict(state)
        assert saved(each) == state
        assert taken(each) == rest
    assert dataset.read == (0 if workers else 12)
    for each in (cursor, other):
        each.load_state_dict(ended)
        assert taken(each) == []
        each.begin_epoch(2)
        assert len(taken(each)) == 6
        each.load_state_dict(untouched)
        each.begin_epoch(1)
        assert taken(each, 2) == [[[1], [2], [3]], [[4], [5], [6]]]
    assert cursor.batches_per_epoch == 6
    with pytest.raises(ValueError, match="without the loader's state"):
        cursor.load_state_dict({"epoch": 1, "index": 0, "batch_size": 3, "seed": 5})


def test_the_place_costs_nothing() -> None:
    """A restore to batch 300 and the next batch read one batch of samples; the order of an epoch is drawn once."""
    loader = DataLoader(Cheap(), batch_size=8, shuffle=True, generator=torch.Generator())
    cursor = LoaderCursor(loader, seed=1)
    cursor.begin_epoch(1)
    cursor.next_batch()
    state = cursor.state_dict()
    Cheap.read = 0
    cursor.load_state_dict(state | {"index": 300})
    assert Cheap.read == 0
    cursor.next_batch()
    assert Cheap.read == 8


class Cheap(Dataset[torch.Tensor]):
    read = 0

    def __len__(self) -> int:
        return 3200

    def __getitem__(self, index: int) -> torch.Tensor:
        Cheap.read += 1
        return torch.zeros(1)


@pytest.mark.parametrize("own", [torch.Generator(), random.Random(0), np.random.RandomState(0)])
def test_generators_of_a_data_set_are_seeded_for_every_batch(own: Any) -> None:
    """Without workers they are not part of the training state, so they are seeded from the place."""

    class Own(Cheap):
        def __init__(self) -> None:
            self.generator = own

        def __getitem__(self, index: int) -> torch.Tensor:
            if isinstance(own, torch.Generator):
                return torch.rand(1, generator=own)
            return torch.tensor([own.random() if isinstance(own, random.Random) else own.random_sample()])

    cursor = LoaderCursor(DataLoader(Own(), batch_size=8), seed=1)
    cursor.begin_epoch(1)
    taken(cursor, 3)
    state = saved(cursor)
    rest = taken(cursor, 3)
    cursor.load_state_dict(state)
    assert taken(cursor, 3) == rest


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_passed_over_without_reading_it(workers: int) -> None:
    """Also one with a sample that cannot be read; those after it are the same, and the epoch ends where it did."""
    plain: DataLoader[Any] = DataLoader(Noisy(), batch_size=4, num_workers=workers)
    expected = LoaderCursor(plain, seed=3)
    expected.begin_epoch(1)
    places = [first_index(batch) for batch in taken(expected)]
    cursor = LoaderCursor(DataLoader(Noisy(bad=9), batch_size=4, num_workers=workers), seed=3)
    cursor.begin_epoch(1)
    found = [first_index(batch) for batch in taken(cursor, 2)]
    assert cursor.pass_over()
    found += [first_index(batch) for batch in taken(cursor)]
    assert found == places[:2] + places[3:]
    assert not cursor.pass_over()
    cursor.close()
    expected.close()


def first_index(batch: Any) -> float:
    """The index of a batch's first sample."""
    return float(torch.as_tensor(batch).reshape(-1)[0])


def test_batches_of_a_loader_without_indices_are_not_passed_over() -> None:
    """They have to be read."""
    cursor = LoaderCursor(DataLoader(Stream(), batch_size=3), seed=3, batches_per_epoch=6)
    cursor.begin_epoch(1)
    assert not cursor.pass_over()
    assert len(taken(cursor)) == cursor.batches_per_epoch
