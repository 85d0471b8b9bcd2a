"""The bytes of the signal board, version 1: offsets, records and their encoding.

All integers are unsigned and little-endian; every block starts at a multiple of 64. Times are CLOCK_MONOTONIC
nanoseconds, which all processes of one boot share, except where noted; 0 is never or none. Reserved bytes are zero.

The board (5248 bytes)
    offset  size  what
         0   256  header: written once, before the file gets its name
       256    64  bell: u32 futex word at its start, the rest reserved
       320  4608  8 participant blocks of 576 bytes, in the order of PARTICIPANTS
      4928   320  rollback block, written by tolaria's process

Header
    offset  size  what
         0     8  magic "TOLBOARD"
         8     4  version of this layout: 1
        12     4  number of participant blocks: 8
        16     8  size of the board in bytes; the file has exactly this size
        24     8  creation time, Unix nanoseconds (wall clock, for display only)
        32     8  creation time, monotonic
        40     4  bytes of the run id
        44     4  reserved
        48    16  boot id of the kernel (zero where it has none)
        64   128  run id, UTF-8
       192    60  reserved
       252     4  CRC-32 (zlib) of bytes 0 to 251

Participant block (576) and rollback block (320): one line of words, then two copies of the payload
    offset  size  what
         0     8  sequence: generation of the current payload
         8     8  heartbeat of the process (tolaria: of its event loop); not in the rollback block
        16     8  heartbeat of the compute lane (tolaria only)
        24     8  work of the compute lane (tolaria only): its phase in the low byte, a LanePhase, and
                  above it for how many milliseconds it may be silent in that phase; 0: as the reader decides
        32    32  reserved
        64     n  payload, copy 0 (n = 256 for a participant, 128 for the rollback block)
      64+n     n  payload, copy 1

Payload of a participant (256)
    offset  size  what
         0     8  generation
         8     8  signal id: the last one that this block raised; clearing keeps it, so that ids never repeat
        16     8  time raised
        24     8  acknowledged signal id (of any block)
        32     8  time acknowledged
        40     8  time cleared: clears the signals of all blocks raised until then (only from tolaria and operator)
        48     4  index of the block, 0 to 7
        52     4  pid of the owner, in its own namespace
        56     4  raised level, a leyline EmergencyLevel; 0 = none
        60     4  bytes of the reason, 0 to 160
        64   160  reason, UTF-8, cut at a character
       224    28  reserved
       252     4  CRC-32 (zlib) of bytes 0 to 251

Payload of the rollback block (128)
    offset  size  what
         0     8  generation
         8     8  target step
        16     8  deadline
        24     8  time of the state
        32     4  state: idle 0, prepare 1, commit 2, confirm 3, aborted 4, deadline 5
        36     4  tier, a leyline RollbackTier
        40     4  pid of the owner
        44     4  bytes of the rollback id, 0 to 64
        48    64  rollback id, UTF-8
       112    12  reserved
       124     4  CRC-32 (zlib) of bytes 0 to 123

Reading a payload: load the sequence s; copy payload number s & 1; load the sequence again. If it changed, start over.
The copy is valid when its generation equals s and its CRC matches; otherwise the block is damaged and ignored.
Writing (owner only): fill the *other* copy with generation s + 1 and its CRC, then store s + 1 to the sequence. An
owner that dies at any instruction leaves its last payload readable. Generations wrap at 2**64.

Heartbeats and the lane's work lie outside sequence and CRC: each is one aligned 8-byte store, atomic on 64-bit
machines, and does not make readers of the payload start over.

Ringing the bell: after its sequence store a writer stores (index << 28 | generation & 0xfffffff) to the futex word
(index 8 is the rollback block, 9 the creator removing the board) and calls FUTEX_WAKE (shared) on it. Each writer has
a distinct tag, so every store changes the word without reading it first, and concurrent stores cannot cancel each
other. A waiter loads the word, reads the blocks, then calls FUTEX_WAIT with the value it loaded.

Memory order: readers need load-load, writers store-store order. x86-64 provides both. Elsewhere (aarch64) writers put
a release and readers an acquire barrier between the steps above.

The effective signal is the one of the highest level among the signals that are not cleared; among equals, the one
raised first.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, unique
from typing import NamedTuple
from zlib import crc32

from leyline.v1.enums_pb2 import EmergencyLevel, RollbackTier
from tolaria.errors import BoardRefusedError, SignalValueError

MAGIC = b"TOLBOARD"
VERSION = 1
PARTICIPANTS = ("tolaria", "kasmina", "tamiyo", "sentinel", "operator", "spare-1", "spare-2", "spare-3")
CLEARERS = ("tolaria", "operator")
"""Participants whose clearing time counts for every block."""

LINE = 64
HEADER_SIZE = 256
BELL_AT = HEADER_SIZE
BLOCKS_AT = BELL_AT + LINE
PARTICIPANT_PAYLOAD = 256
PARTICIPANT_SIZE = LINE + 2 * PARTICIPANT_PAYLOAD
ROLLBACK_AT = BLOCKS_AT + len(PARTICIPANTS) * PARTICIPANT_SIZE
ROLLBACK_PAYLOAD = 128
ROLLBACK_SIZE = LINE + 2 * ROLLBACK_PAYLOAD
ROLLBACK_INDEX = len(PARTICIPANTS)
CREATOR_INDEX = ROLLBACK_INDEX + 1
BOARD_SIZE = ROLLBACK_AT + ROLLBACK_SIZE
HEARTBEAT = 8
LANE_HEARTBEAT = 16
LANE_WORK = 24

RUN_ID_MAX = 128
REASON_MAX = 160
ROLLBACK_ID_MAX = 64
MASK64 = 2**64 - 1
LEVELS = frozenset(EmergencyLevel.values())

_HEADER = struct.Struct("<8sIIQQQI4x16s128s60x")
_PARTICIPANT = struct.Struct("<QQQQQQIIII160s28x")
_ROLLBACK = struct.Struct("<QQQQIIII64s12x")
_CRC = struct.Struct("<I")
_CRC_OF_SEALED = 0x2144DF1C  # the CRC-32 of anything followed by its own little-endian CRC-32
_TIERS = frozenset(RollbackTier.values())

new_tuple = tuple.__new__
"""`new_tuple(ParticipantRecord, fields)` takes half the time of `ParticipantRecord(*fields)`, a Python function."""


@unique
class RollbackState(IntEnum):
    """Phase of a rollback."""

    IDLE = 0
    PREPARE = 1
    COMMIT = 2
    CONFIRM = 3
    ABORTED = 4
    DEADLINE = 5


@dataclass(frozen=True, slots=True)
class Header:
    """Identity of a board. `created_unix_ns` is wall-clock time, for display only."""

    run_id: str
    boot_id: bytes
    created_unix_ns: int
    created_ns: int


class ParticipantRecord(NamedTuple):
    """What a participant published. A named tuple is created in a third of the time of a dataclass."""

    level: EmergencyLevel.ValueType = EmergencyLevel.EMERGENCY_LEVEL_UNSPECIFIED
    reason: str = ""
    signal_id: int = 0
    raised_ns: int = 0
    acknowledged_id: int = 0
    acknowledged_ns: int = 0
    cleared_ns: int = 0
    owner_pid: int = 0


@dataclass(frozen=True, slots=True)
class RollbackRecord:
    """The rollback block. `changed_ns` is the time of the state."""

    state: RollbackState = RollbackState.IDLE
    rollback_id: str = ""
    target_step: int = 0
    deadline_ns: int = 0
    tier: RollbackTier.ValueType = RollbackTier.ROLLBACK_TIER_UNSPECIFIED
    changed_ns: int = 0
    owner_pid: int = 0


@unique
class LanePhase(IntEnum):
    """What the compute lane does."""

    STEPPING = 0
    LOADING = 1
    """Waits for the job's data."""
    EVALUATING = 2
    COMPILING = 3
    STARTING = 4
    """Takes its first step, which fills caches and may compile."""


class LaneWork(NamedTuple):
    """What the compute lane does, and for how long it may be silent meanwhile; 0: as the reader decides."""

    phase: int
    silence_ms: int

    @classmethod
    def of_word(cls, word: int) -> LaneWork:
        """Returns the work in a word of the board."""
        return cls(word & 0xFF, word >> 8)

    @property
    def word(self) -> int:
        """The word of the board."""
        return self.silence_ms << 8 | self.phase


class Signal(NamedTuple):
    """An emergency level raised by `origin`."""

    origin: str
    level: EmergencyLevel.ValueType
    reason: str
    signal_id: int
    raised_ns: int


_STATES = frozenset(RollbackState)


def active_signals(records: Mapping[str, ParticipantRecord]) -> tuple[Signal, ...]:
    """Returns the signals that are raised and not cleared, the effective one first."""
    until_ns = cleared_until(records)
    signals = [
        new_tuple(Signal, (name, record.level, record.reason, record.signal_id, record.raised_ns))
        for name, record in records.items()
        if record.level and record.raised_ns > until_ns
    ]
    if len(signals) > 1:
        signals.sort(key=lambda signal: (-signal.level, signal.raised_ns))
    return tuple(signals)


def cleared_until(records: Mapping[str, ParticipantRecord]) -> int:
    """Returns the time until which the signals of all participants are cleared; 0 when they never were."""
    return max([records[name].cleared_ns for name in CLEARERS if name in records], default=0)


def participant_at(index: int) -> int:
    """Returns the offset of the block of participant `index`."""
    return BLOCKS_AT + index * PARTICIPANT_SIZE


def heartbeat_words(index: int) -> tuple[int, int]:
    """Returns the numbers of the words with the heartbeats of participant `index`: its process's and the lane's."""
    word = participant_at(index) // 8
    return word + HEARTBEAT // 8, word + LANE_HEARTBEAT // 8


def lane_work_word(index: int) -> int:
    """Returns the number of the word with the lane's work of participant `index`."""
    return (participant_at(index) + LANE_WORK) // 8


def index_of(participant: str) -> int:
    """Returns the index of a participant's block. Raises `SignalValueError` for an unknown name."""
    if participant not in PARTICIPANTS:
        raise SignalValueError(f"the board has no participant {participant!r}, only {', '.join(PARTICIPANTS)}")
    return PARTICIPANTS.index(participant)


def bell_value(index: int, generation: int) -> int:
    """Returns the futex word that writer `index` stores when it publishes `generation`."""
    return index << 28 | generation & 0xFFFFFFF


def cut_at_character(text: str, size_max: int) -> bytes:
    """Returns `text` as at most `size_max` bytes of UTF-8 that end with a whole character; lone surrogates as "?"."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= size_max:
        return encoded
    return encoded[:size_max].decode("utf-8", "ignore").encode("utf-8")


def blank_board(header: Header) -> bytes:
    """Returns a new board: the header, and every block with a valid empty payload of generation 0.

    Raises `SignalValueError` when the run id is empty or too long: it is an identity and is not cut.
    """
    run_id = header.run_id.encode("utf-8", "replace")
    if not 0 < len(run_id) <= RUN_ID_MAX:
        raise SignalValueError(f"a run id has 1 to {RUN_ID_MAX} bytes, not {len(run_id)}")
    fields = (MAGIC, VERSION, len(PARTICIPANTS), BOARD_SIZE, header.created_unix_ns, header.created_ns, len(run_id))
    head = _sealed(_HEADER, *fields, header.boot_id, run_id)
    blocks = b"".join(
        bytes(LINE) + encode_participant(index, 0, ParticipantRecord()) + bytes(PARTICIPANT_PAYLOAD)
        for index in range(len(PARTICIPANTS))
    )
    rollback = bytes(LINE) + encode_rollback(0, RollbackRecord()) + bytes(ROLLBACK_PAYLOAD)
    return head + bytes(LINE) + blocks + rollback


def decode_header(path: str, head: bytes, file_size: int) -> Header:
    """Returns the header in `head`, the first 256 bytes of the file at `path`, or all of a shorter file.

    Raises `BoardRefusedError` when it is no board of this version: foreign, truncated, version, size or header.
    """
    if head[: len(MAGIC)] != MAGIC[: len(head)]:
        raise BoardRefusedError(path, "foreign", "it does not begin like a signal board")
    if len(head) < HEADER_SIZE:
        raise BoardRefusedError(path, "truncated", f"{file_size} bytes do not hold the header")
    _, version, participants, size, unix_ns, created_ns, id_size, boot_id, run_id = _HEADER.unpack_from(head)
    if version != VERSION:
        raise BoardRefusedError(path, "version", f"it has layout version {version}, this program reads {VERSION}")
    if file_size < BOARD_SIZE:
        raise BoardRefusedError(path, "truncated", f"{file_size} of {BOARD_SIZE} bytes are there")
    if size != BOARD_SIZE or file_size != BOARD_SIZE or participants != len(PARTICIPANTS):
        detail = f"it is {file_size} bytes and says {size} with {participants} participants, not {BOARD_SIZE}"
        raise BoardRefusedError(path, "size", detail)
    text = _text(run_id, id_size)
    if crc32(head) != _CRC_OF_SEALED or text is None:
        raise BoardRefusedError(path, "header", "its header fails its checksum")
    return Header(text, boot_id, unix_ns, created_ns)


def encode_participant(index: int, generation: int, record: ParticipantRecord) -> bytes:
    """Returns the payload with its CRC. Raises `SignalValueError` when a number does not fit its field."""
    level, text, signal_id, raised, acked_id, acked, cleared, pid = record
    reason = cut_at_character(text, REASON_MAX)
    fields = (generation, signal_id, raised, acked_id, acked, cleared, index, pid, level, len(reason), reason)
    return _sealed(_PARTICIPANT, *fields)


def decode_participant(payload: bytes, generation: int, index: int) -> ParticipantRecord | None:
    """Returns the record in a payload; None unless it is an intact payload of that generation and block."""
    if crc32(payload) != _CRC_OF_SEALED:
        return None
    found, signal_id, raised, acked_id, acked, cleared, at, pid, level, size, reason = _PARTICIPANT.unpack_from(payload)
    text = _text(reason, size)
    if found != generation or at != index or level not in LEVELS or text is None:
        return None
    return new_tuple(ParticipantRecord, (level, text, signal_id, raised, acked_id, acked, cleared, pid))


def encode_rollback(generation: int, record: RollbackRecord) -> bytes:
    """Returns the payload with its CRC. Raises `SignalValueError` when something does not fit its field."""
    rollback_id = record.rollback_id.encode("utf-8", "replace")
    if len(rollback_id) > ROLLBACK_ID_MAX:
        raise SignalValueError(f"a rollback id has at most {ROLLBACK_ID_MAX} bytes, not {len(rollback_id)}")
    fields = (generation, record.target_step, record.deadline_ns, record.changed_ns, record.state, record.tier)
    return _sealed(_ROLLBACK, *fields, record.owner_pid, len(rollback_id), rollback_id)


def decode_rollback(payload: bytes, generation: int) -> RollbackRecord | None:
    """Returns the record in a payload; None unless it is an intact payload of that generation."""
    if crc32(payload) != _CRC_OF_SEALED:
        return None
    found, step, deadline, changed, state, tier, pid, size, rollback_id = _ROLLBACK.unpack_from(payload)
    text = _text(rollback_id, size)
    if found != generation or state not in _STATES or tier not in _TIERS or text is None:
        return None
    return RollbackRecord(RollbackState(state), text, step, deadline, tier, changed, pid)


def _sealed(form: struct.Struct, *fields: int | bytes) -> bytes:
    try:
        body = form.pack(*fields)
    except struct.error as cause:
        raise SignalValueError(f"a number does not fit its field on the board: {cause}") from cause
    return body + _CRC.pack(crc32(body))


def _text(field: bytes, size: int) -> str | None:
    if size > len(field):
        return None
    try:
        return field[:size].decode("utf-8")
    except UnicodeDecodeError:
        return None
