from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from leyline.v1.enums_pb2 import EmergencyLevel
from support.boards import acknowledgements
from tolaria.errors import BlockOwnedError, BoardLostError, SignalError
from tolaria.signals import SignalBoard
from tolaria.signals import board as board_module

NOTICE = EmergencyLevel.EMERGENCY_LEVEL_NOTICE
HALT = EmergencyLevel.EMERGENCY_LEVEL_HALT


def test_another_view_sees_a_signal(board: SignalBoard, other: SignalBoard) -> None:
    """Level, reason, origin and id are the same in both views; a new board has no signal."""
    assert other.effective() is None
    signal_id = board.claim("kasmina").raise_level(HALT, "grafting failed")
    signal = other.effective()
    assert signal is not None
    assert (signal.origin, signal.level, signal.reason) == ("kasmina", HALT, "grafting failed")
    assert signal.signal_id == signal_id


def test_the_highest_level_is_effective_until_cleared(board: SignalBoard, other: SignalBoard) -> None:
    """After a participant clears its signal, the next highest is effective."""
    tolaria, tamiyo = board.claim("tolaria"), other.claim("tamiyo")
    tolaria.raise_level(NOTICE, "slow")
    tamiyo.raise_level(HALT, "diverged")
    assert [signal.origin for signal in board.active_signals()] == ["tamiyo", "tolaria"]
    tamiyo.clear()
    assert [signal.origin for signal in board.active_signals()] == ["tolaria"]
    assert (tamiyo.record.level, tamiyo.record.reason, tamiyo.record.raised_ns) == (0, "", 0)


def test_acknowledgements_show_participant_and_time(board: SignalBoard, other: SignalBoard) -> None:
    """Acknowledgements of a signal come with their times and without those of other signals."""
    signal_id = board.claim("tolaria").raise_level(HALT, "stop")
    kasmina, tamiyo = other.claim("kasmina"), other.claim("tamiyo")
    kasmina.acknowledge(signal_id)
    tamiyo.acknowledge(signal_id + 1)
    assert acknowledgements(board, signal_id) == {"kasmina": kasmina.record.acknowledged_ns}


def test_a_block_has_one_owner(board: SignalBoard, other: SignalBoard) -> None:
    """A second claim is refused, in this view and in another, until the first is released."""
    first, rollback = board.claim("kasmina"), board.claim_rollback()
    for view in (board, other):
        with pytest.raises(BlockOwnedError):
            view.claim("kasmina")
        with pytest.raises(BlockOwnedError):
            view.claim_rollback()
    first.release()
    rollback.release()
    assert other.claim("kasmina").record.owner_pid == os.getpid()
    other.claim_rollback()
    with pytest.raises(BlockOwnedError, match="not owned here"):
        first.raise_level(HALT, "too late")


def test_a_signal_wakes_a_waiter(board: SignalBoard, other: SignalBoard) -> None:
    """A waiting thread reads the board after the publication that ended its wait."""
    seen = other.bell
    found: list[str] = []

    def watch() -> None:
        other.wait(seen, 600.0)
        signal = other.effective()
        found.append(signal.reason if signal else "nothing")

    watcher = threading.Thread(target=watch)
    watcher.start()
    board.claim("spare-1").clear()
    watcher.join(180)
    board.claim("kasmina").raise_level(HALT, "stop")
    assert found == ["nothing"]
    assert other.wait(seen, 60.0) != seen


def test_waiting_polls_without_a_futex(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board without a futex works the same and is `degraded`."""
    monkeypatch.setattr(board_module, "futex_available", lambda: False)
    with SignalBoard.create(path, "run-1") as board:
        seen = board.bell
        board.claim("kasmina").raise_level(HALT, "stop")
        assert board.degraded
        assert board.wait(seen, 60.0) != seen


def test_removing_a_board_wakes_its_peers(board: SignalBoard, other: SignalBoard) -> None:
    """When the creator removes the board, waiters wake and `current` is false."""
    seen = other.bell
    assert other.current
    board.close(unlink=True)
    assert other.wait(seen, 60.0) != seen
    assert not other.current


def test_a_closed_board_raises(path: Path) -> None:
    """After close everything raises except heartbeats, which are dropped; closing again is harmless."""
    board = SignalBoard.create(path, "run-1")
    kasmina = board.claim("kasmina")
    board.close(unlink=True)
    board.close(unlink=True)
    calls: list[Callable[[], object]] = [
        board.effective,
        board.read_all,
        board.read_rollback,
        lambda: board.bell,
        lambda: board.wait(0, 1.0),
        lambda: board.claim("tamiyo"),
    ]
    for call in calls:
        with pytest.raises(BoardLostError, match="closed"):
            call()
    with pytest.raises(SignalError):
        kasmina.raise_level(HALT, "too late")
    kasmina.beat()


def test_a_truncated_file_raises_instead_of_a_bus_error(board: SignalBoard, path: Path) -> None:
    """Truncation under an attached board raises a typed error; heartbeats are dropped."""
    kasmina = board.claim("kasmina")
    os.truncate(path, 100)
    with pytest.raises(BoardLostError, match="cut short"):
        board.effective()
    with pytest.raises(BoardLostError, match="cut short"):
        kasmina.raise_level(HALT, "stop")
    kasmina.beat()
