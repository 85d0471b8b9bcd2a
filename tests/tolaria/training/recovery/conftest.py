from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from faults.small_training import Training, new_training
from support.checkpoint_room import Rooms


@pytest.fixture
def training() -> Iterator[Training]:
    """A run at its start, on one thread: the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield new_training()
    torch.set_num_threads(before)


@pytest.fixture
def rooms(training: Training, tmp_path: Path) -> Iterator[Rooms]:
    """Makes rooms; at the end writers and journals are closed."""
    rooms = Rooms(training, tmp_path)
    yield rooms
    for room in rooms.made:
        room.disk.gate.set()
        room.writer.__exit__(None, None, None)
        room.storage.journal.close()
