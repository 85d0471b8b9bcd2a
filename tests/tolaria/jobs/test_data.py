from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from tolaria.jobs import BatchCursor, LoaderCursor, TensorCursor

X, XX = torch.arange(10), torch.arange(20)


def tensors(seed: int = 0, batch_size: int = 3, x: torch.Tensor = X) -> TensorCursor:
    """A cursor over ten samples held as tensors."""
    return TensorCursor((x, x * 2), batch_size=batch_size, seed=seed)


def loader(seed: int = 0, batch_size: int = 3, x: torch.Tensor = X) -> LoaderCursor:
    """A cursor over ten samples from a shuffling loader."""
    dataset = TensorDataset(x, x * 2)
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
@settings(max_examples=20)
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
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 4}, "batch_size 4"),
        ({"seed": 7}, "seed 7"),
        ({"x": X[:8]}, "samples 8"),
        ({"x": XX}, "samples 20"),
    ],
)
def test_a_position_among_other_batches_is_refused(
    make: Callable[..., BatchCursor], change: dict[str, Any], words: str
) -> None:
    """A position is valid only for its batch size, seed and length of the data set; the error has both values."""
    other_kind = make(**change)
    other_kind.begin_epoch(1)
    cursor, untouched = make(), make()
    for each in (cursor, untouched):
        each.begin_epoch(2)
        each.next_batch()
    with pytest.raises(ValueError, match=f"saved with {words}; this cursor has"):
        cursor.load_state_dict(other_kind.state_dict())
    assert rest(cursor) == rest(untouched)


@BOTH
def test_a_position_of_version_0_1_0_is_restored(make: Callable[..., BatchCursor]) -> None:
    """It has no length; the state stays as it was saved, so that its digest does, until the next epoch begins."""
    cursor, other = make(), make()
    cursor.begin_epoch(2)
    cursor.next_batch()
    old = {name: value for name, value in cursor.state_dict().items() if name != "samples"}
    other.load_state_dict(old)
    assert other.state_dict() == old
    assert rest(other) == rest(cursor)
    other.begin_epoch(3)
    assert other.state_dict()["samples"] == 10
