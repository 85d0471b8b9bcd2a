from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

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
    """The inputs of all batches that are left in the epoch."""
    batches = []
    while (batch := cursor.next_batch()) is not None:
        assert batch.samples == len(batch.payload[0])
        batches.append(batch.payload[0].tolist())
    return batches


BOTH = pytest.mark.parametrize("make", [tensors, loader])


@BOTH
def test_an_epoch_has_every_sample_once(make: Callable[..., BatchCursor]) -> None:
    """Every sample comes once an epoch, in the announced number of batches, the last one smaller."""
    cursor = make()
    cursor.begin_epoch(1)
    batches = rest(cursor)
    assert sorted(sample for batch in batches for sample in batch) == list(range(10))
    assert [len(b) for b in batches] == [3, 3, 3, 1]
    assert cursor.batches_per_epoch == 4


@BOTH
def test_the_order_depends_on_seed_and_epoch_alone(make: Callable[..., BatchCursor]) -> None:
    """The same seed and epoch give the same order, whatever the global RNG did; others give other orders."""

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
def test_a_saved_place_is_found_again(make: Callable[..., BatchCursor], taken: int, epoch: int) -> None:
    """A cursor that loads another's place goes on with the same batches."""
    cursor = make()
    cursor.begin_epoch(epoch)
    for _ in range(taken):
        cursor.next_batch()
    place = cursor.state_dict()
    other = make()
    other.load_state_dict(place)
    assert rest(other) == rest(cursor)


def test_tensors_of_different_lengths_are_refused() -> None:
    """Inputs and labels that do not match are found before training."""
    with pytest.raises(ValueError, match=r"\[10, 9\]"):
        TensorCursor((X, X[1:]), batch_size=2, seed=0)
    with pytest.raises(ValueError, match="batch_size"):
        TensorCursor((X,), batch_size=0, seed=0)


def test_a_loader_that_cannot_be_repeated_is_refused() -> None:
    """A shuffling loader without a generator of its own could never find a place again."""
    with pytest.raises(ValueError, match="generator"):
        LoaderCursor(DataLoader(TensorDataset(X), shuffle=True), seed=0)


def test_batches_of_dicts_are_counted() -> None:
    """A batch may be a dict of tensors; its samples are the first tensor's length."""
    cursor = LoaderCursor(DataLoader([{"x": X[i], "y": X[i]} for i in range(5)], batch_size=2), seed=0)  # type: ignore[arg-type]
    cursor.begin_epoch(1)
    batch = cursor.next_batch()
    assert batch is not None
    assert batch.samples == 2
