from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from tolaria.errors import LossShapeError
from tolaria.jobs import HOST, Batch, PerSampleLosses, TrainingJob
from tolaria.training.losses import checked_losses

WEIGHT = nn.Parameter(torch.tensor(2.0))


class Losing:
    """A job whose losses are what the test says."""

    def __init__(self, losses: object) -> None:
        self._losses = losses

    def losses(self, model: nn.Module, batch: Batch) -> object:
        return self._losses


def checked(losses: object, *, seed_ids: list[str] | None = None, seeds: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """What the lane gets of a job's losses."""
    batch = Batch(None, 4, seed_ids)
    return dict(checked_losses(cast("TrainingJob", Losing(losses)), nn.Identity(), batch, seeds))


def test_good_losses_pass_as_they_are() -> None:
    """The very tensors, whatever the sources are called; one that is not finite is for others to judge."""
    losses = {HOST: WEIGHT * 3, "aux": WEIGHT * math.nan}
    found = checked(losses)
    assert found.keys() == losses.keys()
    assert all(found[source] is losses[source] for source in losses)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (WEIGHT * 3, "must return a mapping with the source 'host', got a Tensor"),
        ({"aux": WEIGHT * 3}, r"must return a mapping with the source 'host', got \['aux'\]"),
        ({}, r"got \[\]"),
        ({HOST: 3.0}, "source 'host' must be a tensor, got a float"),
        ({HOST: WEIGHT * 3, "aux": (WEIGHT * 3).reshape(1)}, r"source 'aux' must be a scalar, got shape \(1,\)"),
        ({HOST: (WEIGHT * 3).detach()}, "source 'host' carries no graph"),
    ],
)
def test_anything_else_is_refused_and_the_source_named(losses: object, message: str) -> None:
    """The job's author reads what is wrong with which loss."""
    with pytest.raises(LossShapeError, match=message):
        checked(losses)


def test_losses_by_sample_are_split_by_seed() -> None:
    """Of shares of the whole batch; samples of seeds that are not there now are the host's."""
    values = WEIGHT * torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = checked(PerSampleLosses(values), seed_ids=["", "a", "b", "a"], seeds=("a",))
    assert {source: loss.item() for source, loss in found.items()} == {HOST: 2.0, "a": 3.0}
    assert sum(found.values()).requires_grad  # type: ignore[union-attr] # there are two


@pytest.mark.parametrize(
    ("values", "seed_ids", "message"),
    [
        (WEIGHT * torch.ones(4), None, "for a batch without seed_ids"),
        (torch.ones(4), ["", "", "", ""], "carry no graph"),
    ],
)
def test_losses_by_sample_need_ids_and_a_graph(values: Tensor, seed_ids: list[str] | None, message: str) -> None:
    """Without either they cannot be split, or say nothing."""
    with pytest.raises(LossShapeError, match=message):
        checked(PerSampleLosses(values), seed_ids=seed_ids)
