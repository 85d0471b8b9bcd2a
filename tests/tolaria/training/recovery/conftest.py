from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from faults.small_training import Training, new_training


@pytest.fixture
def training() -> Iterator[Training]:
    """A run at its start, on one thread: the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield new_training()
    torch.set_num_threads(before)
