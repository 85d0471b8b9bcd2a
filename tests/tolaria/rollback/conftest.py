from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import pytest
import torch

from faults.small_training import MakeOptimizer, Training, adam, adamw, new_training, sgd


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are fastest with one thread, and the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def training() -> Training:
    """A run at its start."""
    return new_training()


@pytest.fixture
def make_training() -> Callable[..., Training]:
    """Makes runs at their start."""
    return new_training


@pytest.fixture(params=[sgd, adam, adamw], ids=["sgd", "adam", "adamw"])
def make_optimizer(request: pytest.FixtureRequest) -> MakeOptimizer:
    """Each of the optimizers in turn."""
    return cast("MakeOptimizer", request.param)
