from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from tolaria.errors import BrokenJobError
from tolaria.jobs import Batch
from tolaria.ranks.share import Share, split_payload

Pair = namedtuple("Pair", ["x", "y"])  # noqa: PYI024 - as collate functions keep them


@pytest.mark.parametrize("world", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("samples", [1, 2, 5, 12, 13])
def test_shares_are_the_whole_batch_in_order(world: int, samples: int) -> None:
    """Every sample belongs to one rank; a rank without one gets the first, which does not count."""
    batch = Batch((torch.arange(samples), [str(n) for n in range(samples)]), samples, [f"s{n}" for n in range(samples)])
    shares = [Share(rank, world).of(batch) for rank in range(world)]
    numbers = [Share(rank, world).counted(batch) for rank in range(world)]
    counted = [share for share, number in zip(shares, numbers, strict=True) if number]
    assert sum(numbers) == samples
    assert [share.samples for share in shares] == [number or 1 for number in numbers]
    assert torch.cat([share.payload[0] for share in counted]).tolist() == list(range(samples))
    assert [text for share in counted for text in share.payload[1]] == [str(n) for n in range(samples)]
    assert [each for share in counted for each in share.seed_ids or ()] == [f"s{n}" for n in range(samples)]
    others = [share for share, number in zip(shares, numbers, strict=True) if not number]
    assert all(share.payload[0].tolist() == [0] and share.seed_ids == ["s0"] for share in others)
    assert max(numbers) - min(numbers) <= 1


def test_one_rank_has_the_batch_itself() -> None:
    """Whatever it is."""
    batch = Batch(object(), 5)
    assert Share().of(batch) is batch


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (torch.arange(8).view(4, 2), torch.tensor([[2, 3], [4, 5]])),
        (np.arange(4), np.array([1, 2])),
        ({"x": torch.arange(4), "scale": 0.5, "name": "train", "none": None}, None),
        ([torch.arange(4), torch.arange(4)], None),
        (Pair(torch.arange(4), torch.arange(4)), None),
        ([[1], [2, 2], [3], [4]], [[2, 2], [3]]),
        (["a", "b", "c", "d"], ["b", "c"]),
        (("a", "b", "c", "d"), ("b", "c")),  # as default_collate makes it
        ((["a", "b", "c", "d"], torch.arange(4)), None),
    ],
)
def test_what_batches_are_made_of_is_divided(payload: Any, expected: Any) -> None:
    """Tensors and lists with one element for each sample, at any depth; what belongs to all samples stays."""
    found = split_payload(payload, 4, 1, 3)
    assert type(found) is type(payload)
    match payload:
        case dict():
            assert found["x"].tolist() == [1, 2]
            assert (found["scale"], found["name"], found["none"]) == (0.5, "train", None)
        case [torch.Tensor(), torch.Tensor()]:
            assert [each.tolist() for each in found] == [[1, 2], [1, 2]]
        case (list(), torch.Tensor()):
            assert (found[0], found[1].tolist()) == (["b", "c"], [1, 2])
        case _:
            assert found == expected if isinstance(found, (list, tuple)) else np.array_equal(found, expected)


@pytest.mark.parametrize("kind", [OrderedDict, UserDict])
def test_mappings_stay_of_their_class(kind: Any) -> None:
    """As those of tokenizers, which models take by attribute; the batch itself does not change."""
    given = kind({"ids": torch.arange(4)})
    found = split_payload(given, 4, 0, 1)
    assert type(found) is kind
    assert (found["ids"].tolist(), given["ids"].tolist()) == ([0], [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (torch.zeros(3, 4), r"payload is a tensor of shape \(3, 4\)"),
        (torch.zeros(()), r"payload is a tensor of shape \(\)"),
        ((torch.zeros(4), {"mask": torch.zeros(7, 4)}), r"payload\[1\]\['mask'\] is a tensor of shape \(7, 4\)"),
        ({"graph": object()}, r"payload\['graph'\] is a object"),
        ([[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 0]], "payload is a list of 4 lists of 4 values"),
    ],
)
def test_what_cannot_be_divided_is_named(payload: Any, words: str) -> None:
    """With what to do about it: dividing the wrong dimension would train on something else."""
    with pytest.raises(BrokenJobError, match=words) as raised:
        split_payload(payload, 4, 0, 2)
    assert "share(batch, start, stop)" in str(raised.value)


def test_a_job_can_divide_its_batches_itself() -> None:
    """For payloads of its own kind, such as sequences first."""

    class Sequences:
        def share(self, batch: Batch, start: int, stop: int) -> torch.Tensor:
            chosen: torch.Tensor = batch.payload[:, start:stop]
            return chosen

    batch = Batch(torch.arange(12).view(3, 4), 4)
    assert Share(1, 2, Sequences()).of(batch).payload.tolist() == [[2, 3], [6, 7], [10, 11]]
