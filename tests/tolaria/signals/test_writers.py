from __future__ import annotations

import os

import pytest

from leyline.v1.enums_pb2 import EmergencyLevel, RollbackTier
from support.boards import BoardClock
from tolaria.errors import SignalValueError
from tolaria.signals import RollbackState, SignalBoard
from tolaria.signals.layout import RollbackRecord

NOTICE = EmergencyLevel.EMERGENCY_LEVEL_NOTICE
CONSERVATIVE = EmergencyLevel.EMERGENCY_LEVEL_CONSERVATIVE
HALT = EmergencyLevel.EMERGENCY_LEVEL_HALT


def test_clear_all_clears_the_signals_of_all_participants(board: SignalBoard, other: SignalBoard) -> None:
    """No signal raised before is active, though each block keeps its record; a later signal is active."""
    tamiyo = other.claim("tamiyo")
    tamiyo.raise_level(HALT, "diverged")
    board.claim("tolaria").clear_all()
    assert other.effective() is None
    assert tamiyo.record.reason == "diverged"
    tamiyo.raise_level(NOTICE, "again")
    assert [signal.reason for signal in board.active_signals()] == ["again"]


def test_only_tolaria_and_operator_clear_all(board: SignalBoard) -> None:
    """A peer that clears for others is refused."""
    with pytest.raises(SignalValueError, match="may not clear"):
        board.claim("kasmina").clear_all()


@pytest.mark.parametrize("level", [0, 5, -1, 99])
def test_unknown_levels_are_refused(board: SignalBoard, level: EmergencyLevel.ValueType) -> None:
    """An unknown level raises and changes nothing."""
    kasmina = board.claim("kasmina")
    before = board.bell
    with pytest.raises(SignalValueError, match="no emergency level"):
        kasmina.raise_level(level, "?")
    assert (board.bell, board.effective()) == (before, None)


def test_a_lower_level_needs_a_clear_first(board: SignalBoard) -> None:
    """A block's level does not fall by itself; the same level again is a new signal."""
    kasmina = board.claim("kasmina")
    first = kasmina.raise_level(CONSERVATIVE, "one")
    with pytest.raises(SignalValueError, match="must be cleared"):
        kasmina.raise_level(NOTICE, "two")
    assert kasmina.raise_level(CONSERVATIVE, "three") > first
    kasmina.clear()
    kasmina.raise_level(NOTICE, "four")
    assert kasmina.record.reason == "four"


def test_signal_id_zero_cannot_be_acknowledged(board: SignalBoard) -> None:
    """0 is no signal's id."""
    with pytest.raises(SignalValueError, match="no signal's id"):
        board.claim("kasmina").acknowledge(0)


def test_long_reasons_are_cut_at_a_character(board: SignalBoard, other: SignalBoard) -> None:
    """160 bytes are published, without a character that does not fit whole."""
    kasmina = board.claim("kasmina")
    kasmina.raise_level(HALT, "x" * 159 + "é")
    signal = other.effective()
    assert signal is not None
    assert signal.reason == kasmina.record.reason == "x" * 159


def test_heartbeats_are_stored_without_a_wake_up(board: SignalBoard, other: SignalBoard, clock: BoardClock) -> None:
    """Event loop and lane have separate heartbeats, and a beat does not change the bell."""
    tolaria = board.claim("tolaria")
    bell, now_ns = other.bell, clock()
    tolaria.beat()
    tolaria.beat_lane()
    state = other.read("tolaria")
    assert (state.heartbeat_ns, state.lane_heartbeat_ns) == (now_ns + 1000, now_ns + 2000)
    assert other.bell == bell


def test_another_view_sees_the_rollback_block(board: SignalBoard, other: SignalBoard, clock: BoardClock) -> None:
    """State, id, step, deadline, tier and time are the same in both views, and waiters are woken."""
    assert other.read_rollback() == RollbackRecord()
    writer, bell, now_ns = board.claim_rollback(), other.bell, clock()
    tier = RollbackTier.ROLLBACK_TIER_FAST
    writer.write(RollbackState.DEADLINE, rollback_id="r-1", target_step=70, deadline_ns=9, tier=tier)
    expected = RollbackRecord(RollbackState.DEADLINE, "r-1", 70, 9, tier, now_ns + 1000, os.getpid())
    assert other.read_rollback() == expected
    assert other.bell != bell


def test_a_new_owner_keeps_the_previous_record(board: SignalBoard, other: SignalBoard) -> None:
    """A restart clears no signal, and ids continue after the last one."""
    kasmina = board.claim("kasmina")
    signal_id = kasmina.raise_level(HALT, "stop")
    kasmina.release()
    again = other.claim("kasmina")
    assert (again.record.signal_id, again.record.reason) == (signal_id, "stop")
    assert board.effective() is not None
    assert again.raise_level(HALT, "more") > signal_id
