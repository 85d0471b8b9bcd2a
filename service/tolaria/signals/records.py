"""What the board says, as values, and which signal counts. Pure: knows nothing of bytes, files or time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum, unique
from typing import TYPE_CHECKING, NamedTuple

from leyline.v1.enums_pb2 import EmergencyLevel, RollbackTier

if TYPE_CHECKING:
    from collections.abc import Mapping

CLEARERS = ("tolaria", "operator")

new_tuple = tuple.__new__
"""`new_tuple(ParticipantRecord, fields)` is `ParticipantRecord(*fields)` without a call into Python: half the cost."""


@unique
class BlockCondition(Enum):
    """What became of reading a block: OK; TORN, its owner wrote through every retry; DAMAGED, its check failed."""

    OK = "ok"
    TORN = "torn"
    DAMAGED = "damaged"


@unique
class RollbackState(IntEnum):
    """Where the rollback that the board shows has got to."""

    IDLE = 0
    PREPARE = 1
    COMMIT = 2
    CONFIRM = 3
    ABORTED = 4
    DEADLINE = 5


@dataclass(frozen=True, slots=True)
class Header:
    """What a board says of itself. `created_unix_ns` is wall-clock time, for people only."""

    run_id: str
    boot_id: bytes
    created_unix_ns: int
    created_ns: int


class ParticipantRecord(NamedTuple):
    """What a participant published. Times are monotonic nanoseconds; 0 = never or none.

    A named tuple, not a dataclass: one is made on each side of every signal, at a third of the cost.
    """

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
    """What the rollback block says. `deadline_ns` and `changed_ns` are monotonic nanoseconds; 0 = none."""

    state: RollbackState = RollbackState.IDLE
    rollback_id: str = ""
    target_step: int = 0
    deadline_ns: int = 0
    tier: RollbackTier.ValueType = RollbackTier.ROLLBACK_TIER_UNSPECIFIED
    changed_ns: int = 0
    owner_pid: int = 0


@dataclass(frozen=True, slots=True)
class ParticipantState:
    """A block as it was read; `record` is None unless `condition` is OK, the heartbeats (monotonic ns) always hold."""

    name: str
    condition: BlockCondition
    heartbeat_ns: int
    lane_heartbeat_ns: int
    record: ParticipantRecord | None


class Signal(NamedTuple):
    """An emergency raised on the board by participant `origin` at `raised_ns` (monotonic); a tuple as the record is."""

    origin: str
    level: EmergencyLevel.ValueType
    reason: str
    signal_id: int
    raised_ns: int


def standing_signals(records: Mapping[str, ParticipantRecord]) -> tuple[Signal, ...]:
    """Every signal that is raised and not void, the one that counts first: highest level, then raised first."""
    void_until_ns = voided_until(records)
    signals = [
        new_tuple(Signal, (name, record.level, record.reason, record.signal_id, record.raised_ns))
        for name, record in records.items()
        if record.level and record.raised_ns > void_until_ns
    ]
    if len(signals) > 1:
        signals.sort(key=lambda signal: (-signal.level, signal.raised_ns))
    return tuple(signals)


def voided_until(records: Mapping[str, ParticipantRecord]) -> int:
    """The time until which every signal was cleared, as those say who may clear for all; 0: none was."""
    until_ns = 0
    for name in CLEARERS:
        if name in records and records[name].cleared_ns > until_ns:
            until_ns = records[name].cleared_ns
    return until_ns
