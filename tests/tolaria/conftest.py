"""Fixtures with a small training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import pytest
import torch

from faults.small_training import MakeOptimizer, Training, adam, adamw, new_training, sgd


@pytest.fixture
def make_training() -> Iterator[Callable[..., Training]]:
    """Creates training runs at their start, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield new_training
    torch.set_num_threads(before)


@pytest.fixture
def training(make_training: Callable[..., Training]) -> Training:
    """A training run at its start."""
    return make_training()


@pytest.fixture(params=[sgd, adam, adamw], ids=["sgd", "adam", "adamw"])
def make_optimizer(request: pytest.FixtureRequest) -> MakeOptimizer:
    """Each of the optimizers in turn."""
    return cast("MakeOptimizer", request.param)
