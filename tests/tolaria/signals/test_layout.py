from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import EmergencyLevel, RollbackTier
from tolaria.errors import BoardRefusedError, SignalValueError
from tolaria.signals import layout
from tolaria.signals.layout import Header, ParticipantRecord, RollbackRecord, RollbackState, active_signals

NOTICE = EmergencyLevel.EMERGENCY_LEVEL_NOTICE
ELEVATED = EmergencyLevel.EMERGENCY_LEVEL_ELEVATED
HALT = EmergencyLevel.EMERGENCY_LEVEL_HALT
WORD = st.integers(0, layout.MASK64)
HEADER = Header("run-1", bytes(range(16)), 17, 23)


def test_blocks_are_aligned_and_sizes_are_as_documented() -> None:
    """Blocks start at multiples of 64, and the offsets are those in the docstring."""
    starts = [layout.BELL_AT, layout.ROLLBACK_AT, *(layout.participant_at(i) for i in range(8))]
    assert [start % 64 for start in starts] == [0] * 10
    assert (layout.BOARD_SIZE, layout.BLOCKS_AT, layout.PARTICIPANT_SIZE) == (5248, 320, 576)
    assert (layout.ROLLBACK_AT, layout.ROLLBACK_SIZE) == (4928, 320)
    assert len(layout.blank_board(HEADER)) == layout.BOARD_SIZE
    for number in ("5248", "4928", "576", "320"):
        assert number in str(layout.__doc__)


def test_fields_lie_at_the_documented_offsets() -> None:
    """A participant's payload has each field where the table has it."""
    record = ParticipantRecord(EmergencyLevel.EMERGENCY_LEVEL_HALT, "é!", 11, 12, 13, 14, 15, 16)
    payload = layout.encode_participant(3, 10, record)
    assert struct.unpack_from("<6Q4I", payload) == (10, 11, 12, 13, 14, 15, 3, 16, 4, 3)
    assert payload[64:67] == "é!".encode()


@given(
    level=st.sampled_from(EmergencyLevel.values()),
    reason=st.text(max_size=60),
    numbers=st.tuples(WORD, WORD, WORD, WORD, WORD),
    generation=WORD,
    index=st.integers(0, 7),
)
def test_participant_round_trip(
    level: EmergencyLevel.ValueType, reason: str, numbers: tuple[int, int, int, int, int], generation: int, index: int
) -> None:
    """An encoded record decodes to itself, with its reason cut; with another generation or block to None."""
    record = ParticipantRecord(level, reason, *numbers, 77)
    payload = layout.encode_participant(index, generation, record)
    expected = record._replace(reason=layout.cut_at_character(reason, layout.REASON_MAX).decode())
    assert layout.decode_participant(payload, generation, index) == expected
    assert layout.decode_participant(payload, generation ^ 1, index) is None
    assert layout.decode_participant(payload, generation, index ^ 1) is None


@given(state=st.sampled_from(RollbackState), tier=st.sampled_from(RollbackTier.values()), step=WORD, generation=WORD)
def test_rollback_round_trip(state: RollbackState, tier: RollbackTier.ValueType, step: int, generation: int) -> None:
    """A rollback record decodes to itself, and with another generation to None."""
    record = RollbackRecord(state, "r-é", step, 5, tier, 6, 7)
    payload = layout.encode_rollback(generation, record)
    assert layout.decode_rollback(payload, generation) == record
    assert layout.decode_rollback(payload, generation ^ 1) is None


@given(flip=st.integers(0, layout.PARTICIPANT_PAYLOAD * 8 - 1), index=st.integers(0, 7))
def test_any_flipped_bit_is_detected(flip: int, index: int) -> None:
    """A payload with one bit flipped decodes to None."""
    payload = bytearray(layout.encode_participant(index, 4, ParticipantRecord(reason="all is well")))
    payload[flip // 8] ^= 1 << flip % 8
    assert layout.decode_participant(bytes(payload), 4, index) is None


@given(payload=st.binary(min_size=256, max_size=256), generation=WORD)
def test_arbitrary_payloads_never_crash(payload: bytes, generation: int) -> None:
    """Noise decodes to None; noise with a valid checksum to None or a record."""
    assert layout.decode_participant(payload, generation, 0) is None
    assert layout.decode_rollback(payload[:128], generation) is None
    for size in (256, 128):
        body = payload[: size - 4]
        sealed = body + struct.pack("<I", zlib.crc32(body))
        own = int.from_bytes(body[:8], "little")
        participant = layout.decode_participant(sealed, own, 0) if size == 256 else layout.decode_rollback(sealed, own)
        assert participant is None or participant.owner_pid >= 0


@given(text=st.text(), size=st.integers(0, 200))
def test_reasons_are_cut_at_a_character(text: str, size: int) -> None:
    """A cut text is the longest prefix of whole characters that fits."""
    cut = layout.cut_at_character(text, size)
    whole = text.encode("utf-8", "replace")
    assert whole.startswith(cut)
    assert len(cut) <= size
    assert cut == whole or size - len(cut) < 4
    cut.decode("utf-8")


def test_lone_surrogates_become_question_marks() -> None:
    """A reason that UTF-8 cannot encode is raised all the same."""
    assert layout.cut_at_character("a\ud800b", 160) == b"a?b"


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, b"NOBOARD!", "foreign"),
        (8, b"\x02", "version"),
        (12, b"\x07", "size"),
        (16, b"\x00", "size"),
        (30, b"\xff", "header"),
        (64, b"R", "header"),
        (200, b"\x01", "header"),
    ],
)
def test_a_wrong_header_is_refused(at: int, value: bytes, reason: str) -> None:
    """Each wrong field of the header has its stable reason."""
    head = bytearray(layout.blank_board(HEADER)[:256])
    head[at : at + len(value)] = value
    with pytest.raises(BoardRefusedError) as refused:
        layout.decode_header("board", bytes(head), layout.BOARD_SIZE)
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    ("size", "reason"), [(0, "truncated"), (100, "truncated"), (5247, "truncated"), (5249, "size")]
)
def test_a_file_of_another_size_is_refused(size: int, reason: str) -> None:
    """A short file is `truncated`, a long one has the wrong `size`."""
    with pytest.raises(BoardRefusedError) as refused:
        layout.decode_header("board", (layout.blank_board(HEADER) + b"\0")[: min(size, 256)], size)
    assert refused.value.reason == reason


@given(head=st.binary(max_size=300), size=st.integers(0, 10_000))
def test_arbitrary_headers_never_crash(head: bytes, size: int) -> None:
    """Noise is refused, with and without the magic number."""
    for noise in (head[:256], (layout.MAGIC + head)[:256]):
        with pytest.raises(BoardRefusedError):
            layout.decode_header("board", noise, size)


def test_a_valid_header_round_trips() -> None:
    """A header that was written is accepted and decodes to itself."""
    head = layout.blank_board(HEADER)[:256]
    assert layout.decode_header("board", head, layout.BOARD_SIZE) == HEADER


@pytest.mark.parametrize("run_id", ["", "x" * 129])
def test_run_ids_must_fit(run_id: str) -> None:
    """An empty or too long run id is refused and not cut: it is an identity."""
    with pytest.raises(SignalValueError, match="run id"):
        layout.blank_board(Header(run_id, bytes(16), 0, 0))


def test_numbers_and_ids_must_fit() -> None:
    """A value that does not fit its field raises a typed error."""
    with pytest.raises(SignalValueError, match="does not fit"):
        layout.encode_participant(0, 0, ParticipantRecord(signal_id=2**64))
    with pytest.raises(SignalValueError, match="at most 64 bytes"):
        layout.encode_rollback(0, RollbackRecord(rollback_id="é" * 33))
    with pytest.raises(SignalValueError, match="no participant 'judge'"):
        layout.index_of("judge")


def test_active_signals_are_sorted_by_level() -> None:
    """The highest level comes first; blocks without a signal are left out."""
    signals = active_signals(
        {
            "tolaria": ParticipantRecord(NOTICE, "a", 1, 10),
            "kasmina": ParticipantRecord(),
            "tamiyo": ParticipantRecord(HALT, "b", 2, 30),
            "sentinel": ParticipantRecord(ELEVATED, "c", 3, 20),
        }
    )
    assert [signal.origin for signal in signals] == ["tamiyo", "sentinel", "tolaria"]


def test_of_equal_levels_the_first_raised_comes_first() -> None:
    """The first cause is effective."""
    signals = active_signals(
        {"tolaria": ParticipantRecord(HALT, "late", 1, 20), "tamiyo": ParticipantRecord(HALT, "early", 2, 10)}
    )
    assert [signal.reason for signal in signals] == ["early", "late"]


def test_clearing_covers_signals_raised_until_then() -> None:
    """A signal raised at or before the clearing is cleared, one raised after it is active."""
    records = {
        "tolaria": ParticipantRecord(cleared_ns=20),
        "kasmina": ParticipantRecord(HALT, "before", 1, 20),
        "tamiyo": ParticipantRecord(NOTICE, "after", 2, 21),
    }
    assert [signal.reason for signal in active_signals(records)] == ["after"]


def test_only_tolaria_and_operator_clear_for_all() -> None:
    """The clearing time of any other participant is ignored."""
    halt = ParticipantRecord(HALT, "x", 1, 10)
    assert len(active_signals({"tamiyo": halt, "kasmina": ParticipantRecord(cleared_ns=50)})) == 1
    assert active_signals({"tamiyo": halt, "operator": ParticipantRecord(cleared_ns=50)}) == ()
