from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.signals import PARTICIPANTS, BlockCondition, RollbackState, SignalBoard
from tolaria.signals import latch as latch_module
from tolaria.signals.layout import BLOCKS_AT, BOARD_SIZE, HEARTBEAT, LINE, PARTICIPANT_PAYLOAD, participant_at

NOTICE = EmergencyLevel.EMERGENCY_LEVEL_NOTICE
HALT = EmergencyLevel.EMERGENCY_LEVEL_HALT


def flip(path: Path, at: int) -> None:
    """Flip one bit of the file."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x40]))


def copy_at(name: str, sequence: int) -> int:
    """Offset of the payload that a sequence selects."""
    return participant_at(PARTICIPANTS.index(name)) + LINE + (sequence & 1) * PARTICIPANT_PAYLOAD


def test_latch_a_damaged_block_is_ignored_and_counted(board: SignalBoard, path: Path) -> None:
    """A flipped byte takes a block out of what counts; the others stand, and the owner's next write mends it."""
    kasmina = board.claim("kasmina")
    kasmina.raise_level(HALT, "stop")
    board.claim("tamiyo").raise_level(NOTICE, "slow")
    flip(path, copy_at("kasmina", board._latches[1].sequence) + 70)
    with SignalBoard.attach(path) as fresh:
        assert [signal.origin for signal in fresh.standing()] == ["tamiyo"]
        state = fresh.read("kasmina")
        assert (state.condition, state.record) == (BlockCondition.DAMAGED, None)
        assert fresh.statistics().crc_failures == 2
        kasmina.raise_level(HALT, "stop again")
        assert [signal.origin for signal in fresh.standing()] == ["kasmina", "tamiyo"]


def test_latch_a_claim_repairs_a_damaged_block(board: SignalBoard, path: Path) -> None:
    """A restarted owner of a damaged block starts empty, says so, and never reuses an id."""
    kasmina = board.claim("kasmina")
    signal_id = kasmina.raise_level(HALT, "stop")
    flip(path, copy_at("kasmina", board._latches[1].sequence))
    kasmina.release()
    again = board.claim("kasmina")
    assert (again.repaired, again.record.level) == (True, 0)
    assert board.read("kasmina").condition is BlockCondition.OK
    assert again.raise_level(NOTICE, "up again") > signal_id


def test_latch_a_half_written_copy_is_never_read(board: SignalBoard, path: Path) -> None:
    """Whatever lies in the copy that is being written, readers see the last whole payload."""
    kasmina = board.claim("kasmina")
    for reason in ("one copy", "the other copy"):
        kasmina.raise_level(HALT, reason)
        with path.open("r+b") as file:
            file.seek(copy_at("kasmina", board._latches[1].sequence + 1))
            file.write(b"\xee" * PARTICIPANT_PAYLOAD)
        with SignalBoard.attach(path) as fresh:
            signal = fresh.effective()
            assert signal is not None
            assert signal.reason == reason
            assert fresh.statistics().crc_failures == 0


def test_latch_a_block_written_through_every_retry_is_torn(board: SignalBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader gives up after its bound, reports the block and counts it."""
    latch = board._latches[1]

    def publish_meanwhile() -> None:
        board._memory.words[latch._word] += 1

    monkeypatch.setattr(latch_module, "fence", publish_meanwhile)
    reading = latch.read()
    assert (reading.condition, reading.record) == (BlockCondition.TORN, None)
    assert (board.statistics().torn, board.statistics().retries) == (1, 15)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(BLOCKS_AT, BOARD_SIZE - 1), noise=st.binary(min_size=1, max_size=2000))
def test_latch_arbitrary_bytes_never_crash_a_reader(board: SignalBoard, path: Path, at: int, noise: bytes) -> None:
    """Noise over any blocks is read as whole, torn or damaged, and a claim brings each block back."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(noise[: BOARD_SIZE - at])
    with SignalBoard.attach(path) as fresh:
        fresh.effective()
        fresh.read_rollback()
        for state in fresh.read_all():
            assert (state.record is None) == (state.condition is not BlockCondition.OK)
        for name in PARTICIPANTS:
            fresh.claim(name).clear()
        fresh.claim_rollback().write(RollbackState.IDLE, rollback_id="", target_step=0)
        assert {state.condition for state in fresh.read_all()} == {BlockCondition.OK}
        assert fresh.effective() is None
    assert board.current


def test_latch_heartbeats_survive_damage_around_them(board: SignalBoard, path: Path) -> None:
    """A block whose payload is damaged still shows its heartbeat."""
    kasmina = board.claim("kasmina")
    flip(path, copy_at("kasmina", board._latches[1].sequence))
    kasmina.beat()
    state = board.read("kasmina")
    assert (state.condition, state.heartbeat_ns > 0) == (BlockCondition.DAMAGED, True)
    assert participant_at(1) + HEARTBEAT == 320 + 576 + 8


def test_latch_what_was_read_whole_survives_later_damage(board: SignalBoard, other: SignalBoard, path: Path) -> None:
    """A view that knows a signal keeps it when its bytes rot; once the block has moved on, damaged, it is left out."""
    kasmina, tamiyo = board.claim("kasmina"), board.claim("tamiyo")
    kasmina.raise_level(HALT, "stop")
    assert [signal.origin for signal in other.standing()] == ["kasmina"]
    flip(path, copy_at("kasmina", board._latches[1].sequence))
    tamiyo.raise_level(HALT, "me too")
    assert [signal.origin for signal in other.standing()] == ["kasmina", "tamiyo"]
    assert other.statistics().crc_failures == 0
    kasmina.raise_level(HALT, "stop again")
    flip(path, copy_at("kasmina", board._latches[1].sequence))
    assert [[signal.origin for signal in other.standing()] for _ in range(2)] == [["tamiyo"], ["tamiyo"]]
    assert other.statistics().crc_failures == 2
    kasmina.acknowledge(1)
    assert [signal.reason for signal in other.standing()] == ["me too", "stop again"]
