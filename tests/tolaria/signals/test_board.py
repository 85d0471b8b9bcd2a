from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from leyline.v1.enums_pb2 import EmergencyLevel, RollbackTier
from tolaria.errors import (
    BlockOwnedError,
    BoardLostError,
    SignalError,
    SignalValueError,
)
from tolaria.signals import RollbackRecord, RollbackState, SignalBoard
from tolaria.signals import board as board_module

NOTICE = EmergencyLevel.EMERGENCY_LEVEL_NOTICE
CONSERVATIVE = EmergencyLevel.EMERGENCY_LEVEL_CONSERVATIVE
HALT = EmergencyLevel.EMERGENCY_LEVEL_HALT


def test_board_a_signal_is_seen_by_the_other_view(board: SignalBoard, other: SignalBoard) -> None:
    """Level, reason, origin and id cross, and a new board has none."""
    assert other.effective() is None
    signal_id = board.claim("kasmina").raise_level(HALT, "grafting failed")
    signal = other.effective()
    assert signal is not None
    assert (signal.origin, signal.level, signal.reason) == ("kasmina", HALT, "grafting failed")
    assert signal.signal_id == signal_id


def test_board_the_highest_level_is_effective_until_cleared(board: SignalBoard, other: SignalBoard) -> None:
    """Clearing one's own signal brings the next highest up, and resets level, reason and time."""
    tolaria, tamiyo = board.claim("tolaria"), other.claim("tamiyo")
    tolaria.raise_level(NOTICE, "slow")
    tamiyo.raise_level(HALT, "diverged")
    assert [signal.origin for signal in board.standing()] == ["tamiyo", "tolaria"]
    tamiyo.clear()
    assert [signal.origin for signal in board.standing()] == ["tolaria"]
    assert (tamiyo.record.level, tamiyo.record.reason, tamiyo.record.raised_ns) == (0, "", 0)


def test_board_an_operator_clears_the_signals_of_all(board: SignalBoard, other: SignalBoard) -> None:
    """After clear_all nothing stands, though each block holds what its owner wrote; a later signal stands."""
    tamiyo = other.claim("tamiyo")
    tamiyo.raise_level(HALT, "diverged")
    tolaria = board.claim("tolaria")
    tolaria._parts.clock.now_ns += 1_000_000  # type: ignore[attr-defined]  # the test's own clock
    tolaria.clear_all()
    assert other.effective() is None
    other._parts.clock.now_ns += 2_000_000  # type: ignore[attr-defined]  # as above
    tamiyo.raise_level(NOTICE, "again")
    assert [signal.reason for signal in board.standing()] == ["again"]


def test_board_peers_may_not_clear_for_others(board: SignalBoard) -> None:
    """Only tolaria and the operator void the signals of all."""
    with pytest.raises(SignalValueError, match="may not clear"):
        board.claim("kasmina").clear_all()


@pytest.mark.parametrize("level", [0, 5, -1, 99])
def test_board_unknown_levels_are_refused(board: SignalBoard, level: EmergencyLevel.ValueType) -> None:
    """What is no level raises and changes nothing."""
    kasmina = board.claim("kasmina")
    before = board.bell
    with pytest.raises(SignalValueError, match="no emergency level"):
        kasmina.raise_level(level, "?")
    assert (board.bell, board.effective()) == (before, None)


def test_board_a_block_does_not_go_down_by_itself(board: SignalBoard) -> None:
    """A lower level needs a clear first; the same level again is a new signal."""
    kasmina = board.claim("kasmina")
    first = kasmina.raise_level(CONSERVATIVE, "one")
    with pytest.raises(SignalValueError, match="must be cleared"):
        kasmina.raise_level(NOTICE, "two")
    assert kasmina.raise_level(CONSERVATIVE, "three") > first
    kasmina.clear()
    kasmina.raise_level(NOTICE, "four")
    assert kasmina.record.reason == "four"


def test_board_acknowledgements_tell_who_and_when(board: SignalBoard, other: SignalBoard) -> None:
    """Each participant's acknowledgement of a signal is shown with its time; other signals are not mixed in."""
    signal_id = board.claim("tolaria").raise_level(HALT, "stop")
    kasmina, tamiyo = other.claim("kasmina"), other.claim("tamiyo")
    kasmina.acknowledge(signal_id)
    tamiyo.acknowledge(signal_id + 1)
    assert board.acknowledgements(signal_id) == {"kasmina": kasmina.record.acknowledged_ns}
    with pytest.raises(SignalValueError, match="no signal's id"):
        kasmina.acknowledge(0)


def test_board_long_reasons_are_cut_at_a_character(board: SignalBoard, other: SignalBoard) -> None:
    """160 bytes cross; a character that would be split does not."""
    kasmina = board.claim("kasmina")
    kasmina.raise_level(HALT, "x" * 159 + "é")
    signal = other.effective()
    assert signal is not None
    assert signal.reason == kasmina.record.reason == "x" * 159


def test_board_heartbeats_show_and_wake_nobody(board: SignalBoard, other: SignalBoard) -> None:
    """Loop and lane beat apart, and a beat does not ring."""
    tolaria = board.claim("tolaria")
    before = other.bell
    tolaria.beat()
    loop_ns = board._parts.clock.now_ns  # type: ignore[attr-defined]  # the test's own clock
    tolaria.beat_lane()
    state = other.read("tolaria")
    assert (state.heartbeat_ns, state.lane_heartbeat_ns) == (loop_ns, loop_ns + 1000)
    assert other.bell == before


def test_board_the_rollback_block_crosses(board: SignalBoard, other: SignalBoard) -> None:
    """State, id, step, deadline, tier and time are seen by the other view, and waiters are woken."""
    assert other.read_rollback() == RollbackRecord()
    before = other.bell
    tier = RollbackTier.ROLLBACK_TIER_FAST
    board.claim_rollback().write(RollbackState.DEADLINE, rollback_id="r-1", target_step=70, deadline_ns=9, tier=tier)
    now_ns = board._parts.clock.now_ns  # type: ignore[attr-defined]  # the test's own clock
    assert other.read_rollback() == RollbackRecord(RollbackState.DEADLINE, "r-1", 70, 9, tier, now_ns, os.getpid())
    assert other.bell != before


def test_board_a_block_has_one_owner(board: SignalBoard, other: SignalBoard) -> None:
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


def test_board_a_new_owner_finds_what_the_last_one_left(board: SignalBoard, other: SignalBoard) -> None:
    """A restart takes back no signal, and ids go on from the last one."""
    kasmina = board.claim("kasmina")
    signal_id = kasmina.raise_level(HALT, "stop")
    kasmina.release()
    again = other.claim("kasmina")
    assert (again.repaired, again.record.signal_id, again.record.reason) == (False, signal_id, "stop")
    assert board.effective() is not None
    assert again.raise_level(HALT, "more") > signal_id


def test_board_waiting_wakes_on_a_signal(board: SignalBoard, other: SignalBoard) -> None:
    """A waiter in a thread sees the signal that ended its wait."""
    seen = other.bell
    found: list[str] = []

    def watch() -> None:
        other.wait(seen, 60.0)
        signal = other.effective()
        found.append(signal.reason if signal else "nothing")

    watcher = threading.Thread(target=watch)
    watcher.start()
    board.claim("spare-1").clear()
    watcher.join(60)
    board.claim("kasmina").raise_level(HALT, "stop")
    assert found == ["nothing"]
    assert other.wait(seen, 60.0) != seen


def test_board_degraded_tells_that_it_polls(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a futex the board works the same and says so."""
    monkeypatch.setattr(board_module, "futex_available", lambda: False)
    with SignalBoard.create(path, "run-1") as board:
        seen = board.bell
        board.claim("kasmina").raise_level(HALT, "stop")
        assert board.degraded
        assert board.wait(seen, 60.0) != seen


def test_board_peers_see_that_a_board_is_over(board: SignalBoard, other: SignalBoard) -> None:
    """When the founder leaves, waiters wake and `current` is false."""
    seen = other.bell
    assert other.current
    board.close(unlink=True)
    assert other.wait(seen, 60.0) != seen
    assert not other.current


def test_board_a_closed_board_says_so(path: Path) -> None:
    """After close everything raises but beats, which are counted; closing again is harmless."""
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
    assert board.statistics().lost_beats == 1


def test_board_a_file_cut_short_is_noticed_before_it_is_touched(board: SignalBoard, path: Path) -> None:
    """Truncation under an attached board raises a typed error instead of a bus error; beats are dropped and counted."""
    kasmina = board.claim("kasmina")
    os.truncate(path, 100)
    with pytest.raises(BoardLostError, match="cut short"):
        board.effective()
    with pytest.raises(BoardLostError, match="cut short"):
        kasmina.raise_level(HALT, "stop")
    kasmina.beat()
    assert board.statistics().lost_beats == 1
