"""The numbers of a step that travel with its gradients: exact sums, and what ranks say by them."""

from __future__ import annotations

import math

import pytest
import torch

from tolaria.errors import RankFailedError, RanksDifferError
from tolaria.ranks.step_word import StepWord

STEPS = {"completed steps": 2**20 + 7, "batches read": 3}


def summed(words: list[StepWord], dtype: torch.dtype) -> torch.Tensor:
    """Returns the slots of all ranks, added as the ranks do."""
    total = torch.zeros(words[0].numbers, dtype=dtype)
    for word in words:
        slots = torch.zeros_like(total)
        word.write(slots)
        total += slots
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rank_learns_the_sums(dtype: torch.dtype) -> None:
    """In float64, or nearly so where gradients are float32, whose sums would be wrong in the eighth digit."""
    given = [[0.1, 1e9 / 3, 41.0], [1e-9, math.pi, 1.0], [-0.3, 1e-3, 0.0]]
    words = [StepWord(rank, 3, values, STEPS) for rank, values in enumerate(given)]
    slots = summed(words, dtype)
    for word in words:
        assert word.sums(slots) == pytest.approx([sum(column) for column in zip(*given, strict=True)], rel=1e-13)


def test_what_is_not_finite_stays_in_its_place() -> None:
    """As a loss that is NaN or infinite on one rank."""
    words = [StepWord(0, 2, [math.nan, math.inf, 1.0], STEPS), StepWord(1, 2, [1.0, 1.0, 1.0], STEPS)]
    found = words[1].sums(summed(words, torch.float32))
    assert math.isnan(found[0])
    assert found[1:] == [math.inf, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_that_are_not_at_the_same_step_are_found(dtype: torch.dtype) -> None:
    """By name, on every rank, also if what differs would cancel in a sum."""
    others = [2**20 + 6, 2**20 + 8]
    words = [StepWord(0, 3, [0.0], STEPS)]
    words += [StepWord(rank, 3, [0.0], {**STEPS, "completed steps": step}) for rank, step in enumerate(others, 1)]
    slots = summed(words, dtype)
    for word in words:
        with pytest.raises(RanksDifferError, match="completed steps"):
            word.sums(slots)


def test_a_rank_that_has_failed_is_known_to_all_others() -> None:
    """It does not raise itself: it has an exception of its own."""
    words = [StepWord(0, 2, [1.0], STEPS, failed=True), StepWord(1, 2, [1.0], {**STEPS, "batches read": 4})]
    slots = summed(words, torch.float32)
    with pytest.raises(RankFailedError):
        words[1].sums(slots)
    assert words[0].sums(slots) == [0.0]
