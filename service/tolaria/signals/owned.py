"""Writing a block of the board. Owns claims and publishing; the bytes are `layout`'s, the protocol `latch`'s."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic

from leyline.v1.enums_pb2 import EmergencyLevel, RollbackTier
from tolaria.errors import BlockOwnedError, SignalValueError
from tolaria.signals.latch import Record
from tolaria.signals.layout import (
    HEARTBEAT,
    LANE_HEARTBEAT,
    LEVELS,
    MASK64,
    REASON_MAX,
    bell_value,
    cut_at_character,
    encode_participant,
    encode_rollback,
    participant_at,
)
from tolaria.signals.records import (
    CLEARERS,
    BlockCondition,
    ParticipantRecord,
    RollbackRecord,
    RollbackState,
    new_tuple,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tolaria.signals.futex import Bell
    from tolaria.signals.latch import Latch, Tally
    from tolaria.signals.locks import RangeLocks
    from tolaria.signals.memory import BoardMemory

_ID_BITS = 56
_COUNT_MASK = (1 << _ID_BITS) - 1
_ACKNOWLEDGED_ON = ParticipantRecord._fields.index("acknowledged_id")
_NO_LEVEL = EmergencyLevel.EMERGENCY_LEVEL_UNSPECIFIED


@dataclass(frozen=True, slots=True)
class BoardParts:
    """What the writers of one board share. `clock` gives monotonic nanoseconds."""

    memory: BoardMemory
    locks: RangeLocks
    bell: Bell
    tally: Tally
    clock: Callable[[], int]


class OwnedBlock(Generic[Record]):
    """One block, claimed: locked for this process until `release` or death, and published to one record at a time.

    What a former owner left stands, unless it is damaged: then `repaired` is true and `empty` replaces it. Raises
    `BlockOwnedError` when another living process has it.
    """

    def __init__(
        self,
        parts: BoardParts,
        latch: Latch[Record],
        *,
        index: int,
        encode: Callable[[int, Record], bytes],
        empty: Record,
    ) -> None:
        self._memory, self._locks, self._bell = parts.memory, parts.locks, parts.bell
        self._latch = latch
        self._index = index
        self._encode = encode
        self._mutex = threading.Lock()
        if not parts.locks.try_lock(*latch.extent):
            raise BlockOwnedError(f"block {index} of the board is owned by another living process")
        self.released = False
        found = latch.read()
        self.repaired = found.condition is not BlockCondition.OK
        self._record = empty if found.record is None else found.record
        self._generation = found.sequence

    @property
    def record(self) -> Record:
        """What was published last."""
        return self._record

    def update(self, change: Callable[[Record], Record]) -> Record:
        """Publish `change(record)` and wake all waiters; threads take turns. Microseconds; never waits for readers.

        Raises `BlockOwnedError` once released, in a forked child too, and `BoardLostError` when the file is gone.
        """
        with self._mutex:
            if self.released or not self._locks.held:
                raise BlockOwnedError(f"block {self._index} of the board is not owned here any more")
            self._memory.require_intact()
            record = change(self._record)
            generation = (self._generation + 1) & MASK64
            self._latch.write(self._encode(generation, record), generation)
            self._record, self._generation = record, generation
            self._bell.ring(bell_value(self._index, generation))
            return record

    def release(self) -> None:
        """Let another process claim the block; what it says stands."""
        with self._mutex:
            if not self.released:
                self.released = True
                self._locks.unlock(*self._latch.extent)


class Participant:
    """A participant's own block: raise, clear, acknowledge, beat. Any thread of the owner may call."""

    def __init__(
        self,
        name: str,
        index: int,
        block: OwnedBlock[ParticipantRecord],
        *,
        parts: BoardParts,
        voided_ns: Callable[[], int],
    ) -> None:
        self.name = name
        self._id_base = (index + 1) << _ID_BITS
        self._block = block
        self._parts = parts
        self._memory, self._clock = parts.memory, parts.clock
        self._voided_ns = voided_ns
        at = participant_at(index)
        self._heartbeat = (at + HEARTBEAT) // 8
        self._lane_heartbeat = (at + LANE_HEARTBEAT) // 8
        block.update(lambda record: record._replace(owner_pid=os.getpid()))
        self.beat()

    @property
    def record(self) -> ParticipantRecord:
        """What this block says now; after a restart, what the former owner left."""
        return self._block.record

    @property
    def repaired(self) -> bool:
        """Whether the block was damaged when it was claimed, so that what it said is lost."""
        return self._block.repaired

    def raise_level(self, level: EmergencyLevel.ValueType, reason: str) -> int:
        """Raise `level` with a `reason` (cut to 160 bytes of UTF-8) and wake all waiters; returns the new signal's id.

        Raises `SignalValueError` for an unknown level, or one lower than this block's standing one: that must be
        cleared first.
        """
        if not level or level not in LEVELS:
            raise SignalValueError(f"there is no emergency level {level}")
        return self._block.update(partial(self._raised, level, reason)).signal_id

    def clear(self) -> None:
        """Take back this block's own signal: level, reason and time. Signals of others stand."""
        self._block.update(_cleared)

    def clear_all(self) -> None:
        """Take back this block's signal and void those of all others raised until now, of dead participants too.

        Raises `SignalValueError` unless this is tolaria or operator: readers would not heed the others.
        """
        if self.name not in CLEARERS:
            raise SignalValueError(f"{self.name} may not clear the signals of others")
        self._block.update(lambda record: _cleared(record)._replace(cleared_ns=self._parts.clock()))

    def acknowledge(self, signal_id: int) -> None:
        """Show that this participant has acted on a signal; the last acknowledgement is kept."""
        if not 0 < signal_id <= MASK64:
            raise SignalValueError(f"{signal_id} is no signal's id")
        self._block.update(
            lambda record: record._replace(acknowledged_id=signal_id, acknowledged_ns=self._parts.clock())
        )

    def beat(self) -> None:
        """Show that this process lives (tolaria: its event loop). Under a microsecond; wakes nobody, never raises."""
        self._store(self._heartbeat)

    def beat_lane(self) -> None:
        """Show that the compute lane lives (tolaria only). Under a microsecond; wakes nobody, never raises."""
        self._store(self._lane_heartbeat)

    @property
    def released(self) -> bool:
        """Whether `release` was called."""
        return self._block.released

    def release(self) -> None:
        """Let another process claim this block; what it says stands."""
        self._block.release()

    def _store(self, word: int) -> None:
        # A lost board must not stop training: it is counted here, and whoever raises or reads learns of it.
        memory = self._memory
        if memory.intact:
            memory.words[word] = self._clock()
        else:
            self._parts.tally.add("lost_beats")

    def _raised(self, level: EmergencyLevel.ValueType, reason: str, record: ParticipantRecord) -> ParticipantRecord:
        if level < record.level and record.raised_ns > self._voided_ns():
            standing = EmergencyLevel.Name(record.level)
            raise SignalValueError(f"{self.name} already raised {standing}; it must be cleared before a lower level")
        now_ns = self._clock()
        if not (reason.isascii() and len(reason) <= REASON_MAX):
            reason = cut_at_character(reason, REASON_MAX).decode()
        # Unique on the board: the block's number, then microseconds: ids do not repeat after a repair either.
        count, next_count = now_ns // 1000, (record.signal_id & _COUNT_MASK) + 1
        signal_id = self._id_base | max(count, next_count) & _COUNT_MASK
        # In the order of the record's fields, as `_replace` would do it in three times the time.
        return new_tuple(ParticipantRecord, (level, reason, signal_id, now_ns, *record[_ACKNOWLEDGED_ON:]))


class RollbackWriter:
    """The rollback block, claimed by tolaria's process."""

    def __init__(self, block: OwnedBlock[RollbackRecord], parts: BoardParts) -> None:
        self._block = block
        self._parts = parts

    def write(
        self,
        state: RollbackState,
        *,
        rollback_id: str,
        target_step: int,
        deadline_ns: int = 0,
        tier: RollbackTier.ValueType = RollbackTier.ROLLBACK_TIER_UNSPECIFIED,
    ) -> None:
        """Show where a rollback has got to, and wake all waiters. `deadline_ns` is monotonic; the state's time is now.

        Raises `SignalValueError` when the id is longer than 64 bytes of UTF-8 or a number is out of range.
        """
        record = RollbackRecord(
            state, rollback_id, target_step, deadline_ns, tier, changed_ns=self._parts.clock(), owner_pid=os.getpid()
        )
        self._block.update(lambda _: record)

    @property
    def released(self) -> bool:
        """Whether `release` was called."""
        return self._block.released

    def release(self) -> None:
        """Let another process claim the block; what it says stands."""
        self._block.release()


def claim_participant(
    name: str, index: int, latch: Latch[ParticipantRecord], *, parts: BoardParts, voided_ns: Callable[[], int]
) -> Participant:
    """Claim a participant's block and publish this process as its owner."""
    block = OwnedBlock(
        parts,
        latch,
        index=index,
        encode=partial(encode_participant, index),
        empty=ParticipantRecord(),
    )
    return Participant(name, index, block, parts=parts, voided_ns=voided_ns)


def claim_rollback(index: int, latch: Latch[RollbackRecord], parts: BoardParts) -> RollbackWriter:
    """Claim the rollback block."""
    block = OwnedBlock(parts, latch, index=index, encode=encode_rollback, empty=RollbackRecord())
    return RollbackWriter(block, parts)


def _cleared(record: ParticipantRecord) -> ParticipantRecord:
    return record._replace(level=_NO_LEVEL, reason="", raised_ns=0)
