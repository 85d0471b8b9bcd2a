"""A board in a temporary folder, with two views of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.boards import BoardBytes, BoardClock
from tolaria.signals import SignalBoard


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The board's path."""
    return tmp_path / "board"


@pytest.fixture
def file(path: Path) -> BoardBytes:
    """The board's file."""
    return BoardBytes(path)


@pytest.fixture
def clock() -> BoardClock:
    """The clock of both views."""
    return BoardClock()


@pytest.fixture
def board(path: Path, clock: BoardClock) -> Iterator[SignalBoard]:
    """A new board."""
    with SignalBoard.create(path, "run-1", clock=clock) as board:
        yield board


@pytest.fixture
def other(board: SignalBoard, path: Path, clock: BoardClock) -> Iterator[SignalBoard]:
    """A second view, as in another process; its locks conflict with the first view's."""
    with SignalBoard.attach(path, "run-1", clock=clock) as other:
        yield other
