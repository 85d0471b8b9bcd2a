from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import EmergencyLevel
from support.boards import BoardBytes
from tolaria.signals import PARTICIPANTS, BlockCondition, RollbackState, SignalBoard, seqlock
from tolaria.signals.layout import BLOCKS_AT, BOARD_SIZE, HEARTBEAT, PARTICIPANT_PAYLOAD, participant_at

NOTICE = EmergencyLevel.EMERGENCY_LEVEL_NOTICE
HALT = EmergencyLevel.EMERGENCY_LEVEL_HALT


def test_a_damaged_block_is_ignored(board: SignalBoard, file: BoardBytes) -> None:
    """A flipped bit removes a block's signal; the others stay active, and the owner's next write repairs the block."""
    kasmina = board.claim("kasmina")
    kasmina.raise_level(HALT, "stop")
    board.claim("tamiyo").raise_level(NOTICE, "slow")
    file.flip_bit(file.payload_at("kasmina") + 70)
    with SignalBoard.attach(file.path) as fresh:
        assert [signal.origin for signal in fresh.active_signals()] == ["tamiyo"]
        state = fresh.read("kasmina")
        assert (state.condition, state.record) == (BlockCondition.DAMAGED, None)
        kasmina.raise_level(HALT, "stop again")
        assert [signal.origin for signal in fresh.active_signals()] == ["kasmina", "tamiyo"]


def test_a_claim_repairs_a_damaged_block(board: SignalBoard, file: BoardBytes) -> None:
    """A restarted owner of a damaged block starts empty, and never reuses an id."""
    kasmina = board.claim("kasmina")
    signal_id = kasmina.raise_level(HALT, "stop")
    file.flip_bit(file.payload_at("kasmina"))
    kasmina.release()
    again = board.claim("kasmina")
    assert (again.record.level, again.record.reason) == (0, "")
    assert board.read("kasmina").condition is BlockCondition.OK
    assert again.raise_level(NOTICE, "up again") > signal_id


def test_a_half_written_copy_is_never_read(board: SignalBoard, file: BoardBytes) -> None:
    """Readers get the last complete payload, whatever the copy that is being written contains."""
    kasmina = board.claim("kasmina")
    for reason in ("one copy", "the other copy"):
        kasmina.raise_level(HALT, reason)
        file.write(file.payload_at("kasmina", other=True), b"\xee" * PARTICIPANT_PAYLOAD)
        with SignalBoard.attach(file.path) as fresh:
            signal = fresh.effective()
            assert signal is not None
            assert signal.reason == reason
            assert fresh.read("kasmina").condition is BlockCondition.OK


def test_a_block_written_during_every_try_is_torn(
    board: SignalBoard, file: BoardBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader gives up after its last try and reports the block as torn."""
    at = participant_at(PARTICIPANTS.index("kasmina"))

    def publish_meanwhile() -> None:
        file.write(at, (file.read_word(at) + 1).to_bytes(8, "little"))

    monkeypatch.setattr(seqlock, "fence", publish_meanwhile)
    state = board.read("kasmina")
    assert (state.condition, state.record) == (BlockCondition.TORN, None)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(BLOCKS_AT, BOARD_SIZE - 1), noise=st.binary(min_size=1, max_size=2000))
def test_arbitrary_bytes_never_crash_a_reader(board: SignalBoard, file: BoardBytes, at: int, noise: bytes) -> None:
    """Noise over any blocks is read as intact, torn or damaged, and a claim repairs each block."""
    file.write(at, noise[: BOARD_SIZE - at])
    with SignalBoard.attach(file.path) as fresh:
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


def test_heartbeats_are_readable_in_a_damaged_block(board: SignalBoard, file: BoardBytes) -> None:
    """A block whose payload is damaged still shows its heartbeat."""
    kasmina = board.claim("kasmina")
    file.flip_bit(file.payload_at("kasmina"))
    kasmina.beat()
    state = board.read("kasmina")
    assert (state.condition, state.heartbeat_ns > 0) == (BlockCondition.DAMAGED, True)
    assert participant_at(1) + HEARTBEAT == 320 + 576 + 8


def test_a_record_that_was_read_survives_later_damage(board: SignalBoard, other: SignalBoard, file: BoardBytes) -> None:
    """A view keeps a known signal when its bytes are damaged; once the block changed as well, it is ignored."""
    kasmina, tamiyo = board.claim("kasmina"), board.claim("tamiyo")
    kasmina.raise_level(HALT, "stop")
    assert [signal.origin for signal in other.active_signals()] == ["kasmina"]
    file.flip_bit(file.payload_at("kasmina"))
    tamiyo.raise_level(HALT, "me too")
    assert [signal.origin for signal in other.active_signals()] == ["kasmina", "tamiyo"]
    kasmina.raise_level(HALT, "stop again")
    file.flip_bit(file.payload_at("kasmina"))
    assert [[signal.origin for signal in other.active_signals()] for _ in range(2)] == [["tamiyo"], ["tamiyo"]]
    kasmina.acknowledge(1)
    assert [signal.reason for signal in other.active_signals()] == ["me too", "stop again"]
