from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
)

from tolaria.jobs import BatchCursor, LoaderCursor, TensorCursor

X = torch.arange(10)


def tensors(seed: int = 0, batch_size: int = 3) -> TensorCursor:
    """A cursor over ten samples held as tensors."""
    return TensorCursor((X, X * 2), batch_size=batch_size, seed=seed)


def loader(seed: int = 0, batch_size: int = 3) -> LoaderCursor:
    """A cursor over ten samples from a shuffling loader."""
    dataset = TensorDataset(X, X * 2)
    return LoaderCursor(
        DataLoader(dataset, batch_size=batch_size, shuffle=True, generator=torch.Generator()), seed=seed
    )


def rest(cursor: BatchCursor) -> list[list[int]]:
    """The inputs of the remaining batches of the epoch."""
    batches = []
    while (batch := cursor.next_batch()) is not None:
        assert batch.samples == len(batch.payload[0])
        batches.append(batch.payload[0].tolist())
    return batches


BOTH = pytest.mark.parametrize("make", [tensors, loader])


@BOTH
def test_an_epoch_has_every_sample_once(make: Callable[..., BatchCursor]) -> None:
    """Every sample occurs once, in `batches_per_epoch` batches, of which the last is smaller."""
    cursor = make()
    cursor.begin_epoch(1)
    batches = rest(cursor)
    assert sorted(sample for batch in batches for sample in batch) == list(range(10))
    assert [len(b) for b in batches] == [3, 3, 3, 1]
    assert cursor.batches_per_epoch == 4


@BOTH
def test_the_order_depends_on_seed_and_epoch_alone(make: Callable[..., BatchCursor]) -> None:
    """The same seed and epoch give the same order, independent of the global RNG; others give other orders."""

    def order(seed: int, epoch: int) -> list[list[int]]:
        cursor = make(seed=seed)
        torch.rand(3)
        cursor.begin_epoch(epoch)
        return rest(cursor)

    assert order(1, 1) == order(1, 1)
    assert len({str(order(s, e)) for s in (1, 2) for e in (1, 2)}) == 4


@BOTH
@given(taken=st.integers(0, 5), epoch=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_a_saved_position_is_restored(make: Callable[..., BatchCursor], taken: int, epoch: int) -> None:
    """A cursor that loads another's state continues with the same batches."""
    cursor = make()
    cursor.begin_epoch(epoch)
    for _ in range(taken):
        cursor.next_batch()
    saved = json.loads(json.dumps(cursor.state_dict()))
    other = make()
    other.load_state_dict(saved)
    assert rest(other) == rest(cursor)


def test_tensors_of_different_lengths_are_refused() -> None:
    """Lengths and batch size are checked by the constructor."""
    with pytest.raises(ValueError, match=r"\[10, 9\]"):
        TensorCursor((X, X[1:]), batch_size=2, seed=0)
    with pytest.raises(ValueError, match="batch_size"):
        TensorCursor((X,), batch_size=0, seed=0)


@BOTH
def test_a_position_before_the_first_epoch_is_restored(make: Callable[..., BatchCursor]) -> None:
    """There are no batches before the first epoch, also after restoring that position."""
    saved = make().state_dict()
    other = make()
    other.begin_epoch(1)
    other.next_batch()
    other.load_state_dict(saved)
    assert other.next_batch() is None
    assert other.state_dict() == saved


@BOTH
@pytest.mark.parametrize(("change", "words"), [({"batch_size": 4}, "batch_size 4"), ({"seed": 7}, "seed 7")])
def test_a_position_among_other_batches_is_refused(
    make: Callable[..., BatchCursor], change: dict[str, int], words: str
) -> None:
    """A position is valid only for its batch size and seed."""
    other_kind = make(**change)
    other_kind.begin_epoch(1)
    cursor, untouched = make(), make()
    for each in (cursor, untouched):
        each.begin_epoch(2)
        each.next_batch()
    with pytest.raises(ValueError, match=f"saved with {words}; this cursor has"):
        cursor.load_state_dict(other_kind.state_dict())
    assert rest(cursor) == rest(untouched)


class Backwards(Sampler[int]):
    """A custom order."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(9, -1, -1))

    def __len__(self) -> int:
        return 10


class Subclassed(RandomSampler):
    """A subclass of RandomSampler, which may have another order."""


class Stream(IterableDataset[int]):
    """Samples without indices."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


class Endless(Dataset[int]):
    """Samples by index, without a length."""

    def __getitem__(self, index: int) -> int:
        return index


DATA = TensorDataset(X)
GENERATOR = torch.Generator()


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: DataLoader(DATA, shuffle=True), "generator"),
        (lambda: DataLoader(DATA, sampler=RandomSampler(DATA, generator=torch.Generator())), "the same one"),
        (
            lambda: DataLoader(DATA, sampler=RandomSampler(DATA, generator=torch.Generator()), generator=GENERATOR),
            "the same one",
        ),
        (lambda: DataLoader(DATA, sampler=WeightedRandomSampler([0.1] * 10, 10)), "a WeightedRandomSampler"),
        (
            lambda: DataLoader(DATA, sampler=SubsetRandomSampler(range(5), GENERATOR), generator=GENERATOR),
            "a SubsetRandomSampler",
        ),
        (lambda: DataLoader(DATA, sampler=Backwards()), "a Backwards"),
        (lambda: DataLoader(DATA, sampler=Subclassed(DATA, generator=GENERATOR), generator=GENERATOR), "a Subclassed"),
        (
            lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 2, drop_last=False)),
            "batch_sampler",
        ),
        (lambda: DataLoader(Stream()), "IterableDataset"),
        (lambda: DataLoader(Endless()), "an? Endless, has no length"),
    ],
)
def test_a_loader_that_cannot_be_repeated_is_refused(made: Callable[[], DataLoader[Any]], words: str) -> None:
    """Only the loader's generator may determine the order."""
    with pytest.raises(ValueError, match=words):
        LoaderCursor(made(), seed=0)


def test_samplers_that_can_be_repeated_are_accepted() -> None:
    """The two samplers that a loader makes itself may also be passed to it."""
    sampler = RandomSampler(DATA, generator=GENERATOR)
    for made in (
        DataLoader(DATA, sampler=sampler, generator=GENERATOR),
        DataLoader(DATA, sampler=SequentialSampler(X)),
    ):
        cursor = LoaderCursor(made, seed=0)
        cursor.begin_epoch(1)
        assert sorted(sample for (sample,) in rest(cursor)) == list(range(10))


class CountingLoader(DataLoader[Any]):
    """Counts its live iterators, which keep their workers alive, whenever it makes another one."""

    def __init__(self) -> None:
        super().__init__(DATA, batch_size=3)
        self.made: list[weakref.ref[Any]] = []
        self.alive_at_making: list[int] = []

    def __iter__(self) -> Any:
        self.alive_at_making.append(self.alive)
        iterator = super().__iter__()
        self.made.append(weakref.ref(iterator))
        return iterator

    @property
    def alive(self) -> int:
        return sum(ref() is not None for ref in self.made)


def test_an_unfinished_epoch_ends_before_the_next_begins() -> None:
    """The iterator of an epoch, and with it its workers, is dropped before another epoch begins."""
    watched = CountingLoader()
    cursor = LoaderCursor(watched, seed=0)
    before = cursor.state_dict()
    for epoch in (1, 2):
        cursor.begin_epoch(epoch)
        cursor.next_batch()
    cursor.load_state_dict(cursor.state_dict())
    assert watched.alive_at_making == [0, 0, 0]
    assert watched.alive == 1
    cursor.load_state_dict(before)
    assert watched.alive == 0


def test_batches_of_dicts_are_counted() -> None:
    """The number of samples of a dict of tensors is the length of the first one."""
    cursor = LoaderCursor(DataLoader([{"x": X[i], "y": X[i]} for i in range(5)], batch_size=2), seed=0)  # type: ignore[arg-type]
    cursor.begin_epoch(1)
    batch = cursor.next_batch()
    assert batch is not None
    assert batch.samples == 2
