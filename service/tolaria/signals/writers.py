"""The writing side of the board: blocks claimed by this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic

from leyline.v1.enums_pb2 import EmergencyLevel, RollbackTier
from tolaria.errors import BlockOwnedError, SignalValueError
from tolaria.signals import layout
from tolaria.signals.futex import Bell
from tolaria.signals.layout import CLEARERS, ParticipantRecord, RollbackRecord, RollbackState, new_tuple
from tolaria.signals.mapping import BoardMemory, RangeLocks
from tolaria.signals.seqlock import Record, Seqlock

_ID_BITS = 56
_COUNT_MASK = (1 << _ID_BITS) - 1
_ACKNOWLEDGED_ON = ParticipantRecord._fields.index("acknowledged_id")
_NO_LEVEL = EmergencyLevel.EMERGENCY_LEVEL_UNSPECIFIED


@dataclass(frozen=True, slots=True)
class BoardParts:
    """What the readers and writers of one board share. `clock` returns monotonic nanoseconds."""

    memory: BoardMemory
    locks: RangeLocks
    bell: Bell
    blocks: tuple[Seqlock[ParticipantRecord], ...]
    rollback: Seqlock[RollbackRecord]
    clock: Callable[[], int]


class ClaimedBlock(Generic[Record]):
    """One block, locked for this process until `release` or exit.

    `record` is the published record: after a claim the previous owner's, or `empty` when the block was damaged. Raises
    `BlockOwnedError` when the block is claimed already.
    """

    def __init__(self, parts: BoardParts, block: Seqlock[Record], empty: Record) -> None:
        if not parts.locks.try_lock(*block.extent):
            raise BlockOwnedError(f"block {block.index} of the board is owned already, here or by another process")
        self._parts, self._block, self._clock = parts, block, parts.clock
        self._mutex = threading.Lock()
        self._released = False
        found = block.read()
        self.record = empty if found.record is None else found.record
        self._generation = found.sequence

    def release(self) -> None:
        """Lets another process claim the block; its record stays."""
        with self._mutex:
            if not self._released:
                self._released = True
                self._parts.locks.unlock(*self._block.extent)

    def _update(self, change: Callable[[Record], Record]) -> Record:
        """Publishes `change(record)` and wakes all waiters. Thread-safe; microseconds; never waits for readers.

        Raises `BlockOwnedError` once released or in a forked child, and `BoardLostError` when the file is gone.
        """
        with self._mutex:
            index = self._block.index
            if self._released or not self._parts.locks.held:
                raise BlockOwnedError(f"block {index} of the board is not owned here any more")
            self._parts.memory.require_intact()
            record = change(self.record)
            generation = (self._generation + 1) & layout.MASK64
            self._block.write(generation, record)
            self.record, self._generation = record, generation
            self._parts.bell.ring(layout.bell_value(index, generation))
            return record


class ParticipantWriter(ClaimedBlock[ParticipantRecord]):
    """The block of participant `name`: raise, clear, acknowledge, beat. Thread-safe."""

    def __init__(self, name: str, parts: BoardParts) -> None:
        index = layout.index_of(name)
        super().__init__(parts, parts.blocks[index], ParticipantRecord())
        self.name = name
        self._heartbeat, self._lane_heartbeat = layout.heartbeat_words(index)
        self._lane_work = layout.lane_work_word(index)
        self._update(lambda record: record._replace(owner_pid=os.getpid()))
        self.beat()

    def raise_level(self, level: EmergencyLevel.ValueType, reason: str) -> int:
        """Raises `level`, wakes all waiters and returns the signal's id. `reason` is cut to 160 bytes of UTF-8.

        Raises `SignalValueError` for an unknown level, and for one below this block's active level, which must be
        cleared first.
        """
        if not level or level not in layout.LEVELS:
            raise SignalValueError(f"there is no emergency level {level}")
        return self._update(partial(self._raised, level, reason)).signal_id

    def clear(self) -> None:
        """Clears this block's own signal."""
        self._update(_cleared)

    def clear_all(self) -> None:
        """Clears this block's signal and those that others raised until now.

        Raises `SignalValueError` unless this is tolaria or operator: readers ignore the clearing of others.
        """
        if self.name not in CLEARERS:
            raise SignalValueError(f"{self.name} may not clear the signals of others")
        self._update(lambda record: _cleared(record)._replace(cleared_ns=self._clock()))

    def acknowledge(self, signal_id: int) -> None:
        """Publishes that this participant has acted on a signal; replaces its previous acknowledgement."""
        if not 0 < signal_id <= layout.MASK64:
            raise SignalValueError(f"{signal_id} is no signal's id")
        self._update(lambda record: record._replace(acknowledged_id=signal_id, acknowledged_ns=self._clock()))

    def beat(self) -> None:
        """Stores the process's heartbeat (tolaria: its event loop's). Under a microsecond; no wake-up, never raises."""
        self._store(self._heartbeat)

    def beat_lane(self) -> None:
        """Stores the compute lane's heartbeat (tolaria only). Under a microsecond; no wake-up, never raises."""
        self._store(self._lane_heartbeat)

    def show_lane_work(self, work: int) -> None:
        """Stores what the lane does, a `LaneWork.word` (tolaria only). As quick as a beat; never raises."""
        if (memory := self._parts.memory).intact:
            memory.words[self._lane_work] = work

    def _store(self, word: int) -> None:
        memory = self._parts.memory
        if memory.intact:  # a lost board must not stop training; raising and reading report it
            memory.words[word] = self._clock()

    def _raised(self, level: EmergencyLevel.ValueType, reason: str, record: ParticipantRecord) -> ParticipantRecord:
        if level < record.level and record.raised_ns > self._cleared_ns():
            active = EmergencyLevel.Name(record.level)
            raise SignalValueError(f"{self.name} already raised {active}; it must be cleared before a lower level")
        now_ns = self._clock()
        if not (reason.isascii() and len(reason) <= layout.REASON_MAX):
            reason = layout.cut_at_character(reason, layout.REASON_MAX).decode()
        # Unique on the board: the block's number, then microseconds, so that ids do not repeat after a repair either.
        count, next_count = now_ns // 1000, (record.signal_id & _COUNT_MASK) + 1
        signal_id = (self._block.index + 1) << _ID_BITS | max(count, next_count) & _COUNT_MASK
        # In the order of the record's fields: `_replace` would take three times as long.
        return new_tuple(ParticipantRecord, (level, reason, signal_id, now_ns, *record[_ACKNOWLEDGED_ON:]))

    def _cleared_ns(self) -> int:
        found = {name: self._parts.blocks[layout.index_of(name)].read().record for name in CLEARERS}
        return layout.cleared_until({name: record for name, record in found.items() if record is not None})


class RollbackWriter(ClaimedBlock[RollbackRecord]):
    """The rollback block."""

    def __init__(self, parts: BoardParts) -> None:
        super().__init__(parts, parts.rollback, RollbackRecord())

    def write(
        self,
        state: RollbackState,
        *,
        rollback_id: str,
        target_step: int,
        deadline_ns: int = 0,
        tier: RollbackTier.ValueType = RollbackTier.ROLLBACK_TIER_UNSPECIFIED,
    ) -> None:
        """Publishes the state of a rollback as of now and wakes all waiters. `deadline_ns` is monotonic.

        Raises `SignalValueError` when the id is longer than 64 bytes of UTF-8 or a number is out of range.
        """
        now_ns, pid = self._clock(), os.getpid()
        record = RollbackRecord(state, rollback_id, target_step, deadline_ns, tier, now_ns, pid)
        self._update(lambda _: record)


def _cleared(record: ParticipantRecord) -> ParticipantRecord:
    return record._replace(level=_NO_LEVEL, reason="", raised_ns=0)
