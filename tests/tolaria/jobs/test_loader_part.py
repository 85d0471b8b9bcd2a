"""A `LoaderCursor` of which each rank reads only its samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

from tolaria.jobs import Batch, LoaderCursor
from tolaria.ranks.share import Share


class Recorded(Dataset[Tensor]):
    """The numbers from 0 on, with a random one; `read` lists those that were asked for."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        return torch.tensor([index, int(torch.randint(2**20, ()))])


def batches(cursor: LoaderCursor) -> Iterator[Batch]:
    """Yields the rest of the epoch."""
    while (batch := cursor.next_batch()) is not None:
        yield batch


def numbers(payloads: list[Any]) -> list[int]:
    """The numbers of the samples in payloads."""
    return [int(number) for payload in payloads for number in payload[:, 0]]


def cursors(world: int, **options: Any) -> list[LoaderCursor]:
    """A cursor for each rank over data sets of their own, at the start of an epoch."""
    made = [LoaderCursor(DataLoader(Recorded(23), batch_size=5, shuffle=True, **options), seed=3) for _ in range(world)]
    for rank, cursor in enumerate(made):
        if world > 1:
            assert cursor.read_part(Share(rank, world).bounds, rank)
        cursor.begin_epoch(1)
    return made


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_read_each_sample_once(world: int) -> None:
    """In the order of one process, whose numbers of samples each batch keeps; nothing else is read."""
    (alone,) = cursors(1)
    whole = list(batches(alone))
    found = [list(batches(cursor)) for cursor in cursors(world)]
    for number, batch in enumerate(whole):
        parts = [rank[number] for rank in found]
        assert [part.samples for part in parts] == [batch.samples] * world
        shares = [Share(rank, world, divided=True) for rank in range(world)]
        counted = [s.of(part).payload for s, part in zip(shares, parts, strict=True) if s.counted(part)]
        assert numbers(counted) == numbers([batch.payload])
    assert sum(len(rank) for rank in found) == world * 5


def test_a_rank_asks_the_data_set_for_its_samples_only() -> None:
    """And for the first one where it has none."""
    data = [Recorded(9) for _ in range(2)]
    for rank in range(2):
        cursor = LoaderCursor(DataLoader(data[rank], batch_size=4), seed=0)
        assert cursor.read_part(Share(rank, 2).bounds, rank)
        cursor.begin_epoch(1)
        assert len(list(batches(cursor))) == 3
    assert data[0].read == [0, 1, 4, 5, 8]
    assert data[1].read == [2, 3, 6, 7, 8]


def test_a_position_in_the_middle_is_restored() -> None:
    """As for one process."""
    for cursor, again in zip(cursors(2), cursors(2), strict=True):
        found = [next(batches(cursor)), next(batches(cursor))]
        state = cursor.state_dict()
        rest = [batch.payload[:, 0].tolist() for batch in batches(cursor)]
        again.load_state_dict(state)
        assert [batch.payload[:, 0].tolist() for batch in batches(again)] == rest
        assert len(found) + len(rest) == 5


def test_random_numbers_in_workers_differ_between_ranks() -> None:
    """Else two ranks would draw the same ones for different samples; the first rank's are those of one process."""
    (alone,), (first, second) = cursors(1, num_workers=1), cursors(2, num_workers=1)
    drawn = [next(batches(cursor)).payload[:, 1].tolist() for cursor in (alone, first, second)]
    for cursor in (alone, first, second):
        cursor.close()
    assert drawn[0][:2] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


class Stream(IterableDataset[Tensor]):
    """A stream."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(8))

    def __len__(self) -> int:
        return 8


class Looking(LoaderCursor):
    """A cursor of a user's, which may look at whole batches."""


def test_loaders_that_cannot_read_a_part_say_so() -> None:
    """Streams, single samples, and cursors that may look at whole batches; a batch sampler of the job's can."""
    bounds = Share(0, 2).bounds
    sampler = BatchSampler(RandomSampler(Recorded(8)), 4, drop_last=False)
    assert LoaderCursor(DataLoader(Recorded(8), batch_sampler=sampler), seed=0).read_part(bounds, 0)
    assert not LoaderCursor(DataLoader(Stream(), batch_size=2), seed=0).read_part(bounds, 0)
    assert not LoaderCursor(DataLoader(Recorded(8), batch_size=None), seed=0).read_part(bounds, 0)
    assert not Looking(DataLoader(Recorded(8), batch_size=2), seed=0).read_part(bounds, 0)
