"""A board in a folder of its own, seen from two sides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tolaria.signals import SignalBoard


class Clock:
    """Monotonic nanoseconds that move by one microsecond at each look."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000

    def __call__(self) -> int:
        self.now_ns += 1000
        return self.now_ns


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the board goes."""
    return tmp_path / "board"


@pytest.fixture
def board(path: Path) -> Iterator[SignalBoard]:
    """A founded board with a clock of its own."""
    with SignalBoard.create(path, "run-1", clock=Clock()) as board:
        yield board


@pytest.fixture
def other(board: SignalBoard, path: Path) -> Iterator[SignalBoard]:
    """A second view, as another process would have it; its locks conflict with the first view's."""
    with SignalBoard.attach(path, "run-1", clock=Clock()) as other:
        yield other
