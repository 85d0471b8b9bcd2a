"""One block of the board: two copies of a payload under a sequence, for one writer and many readers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, unique
from typing import Generic, NamedTuple, TypeVar

from tolaria.signals.layout import LINE, ParticipantRecord, new_tuple
from tolaria.signals.mapping import BoardMemory, fence

READ_TRIES = 16
"""A reader gives up then, so that no writer can hold it up."""

Record = TypeVar("Record")


@unique
class BlockCondition(Enum):
    """Result of reading a block: OK; TORN, written during every try; DAMAGED, its check failed."""

    OK = "ok"
    TORN = "torn"
    DAMAGED = "damaged"


_OK, _TORN = BlockCondition.OK, BlockCondition.TORN  # looking up an enum's member costs more than reading the board


@dataclass(frozen=True, slots=True)
class ParticipantState:
    """A block as read; `record` is None unless `condition` is OK. Heartbeats (monotonic ns) are always valid."""

    name: str
    condition: BlockCondition
    heartbeat_ns: int
    lane_heartbeat_ns: int
    record: ParticipantRecord | None


@dataclass(frozen=True, slots=True)
class BoardStatistics:
    """Faults that this process saw: reads repeated, blocks torn, blocks damaged, heartbeats not written."""

    retries: int
    torn: int
    crc_failures: int
    lost_beats: int


class FaultCounter:
    """Counts faults for `BoardStatistics`; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {"retries": 0, "torn": 0, "crc_failures": 0, "lost_beats": 0}

    def add(self, fault: str, count: int = 1) -> None:
        """Counts `fault`, a field of `BoardStatistics`."""
        with self._lock:
            self._counts[fault] += count

    def statistics(self) -> BoardStatistics:
        """Returns the counts."""
        with self._lock:
            return BoardStatistics(**self._counts)


class Reading(NamedTuple, Generic[Record]):
    """Result of a read. `record` is None unless `condition` is OK; `sequence` is the one that was read."""

    condition: BlockCondition
    record: Record | None
    sequence: int


class Seqlock(Generic[Record]):
    """The block at offset `at` with payloads of `size` bytes; `decode(payload, generation)` gives None when damaged.

    `extent` is the block's (offset, size). Any thread may `read`; only one thread of the process that owns the block
    may `write` at a time.
    """

    def __init__(
        self,
        memory: BoardMemory,
        at: int,
        size: int,
        *,
        decode: Callable[[bytes, int], Record | None],
        faults: FaultCounter,
    ) -> None:
        self._memory = memory
        self.extent = (at, LINE + 2 * size)
        self._word = at // 8
        self._copies = (slice(at + LINE, at + LINE + size), slice(at + LINE + size, at + LINE + 2 * size))
        self._decode = decode
        self._faults = faults

    def read(self) -> Reading[Record]:
        """Reads the current payload, in at most `READ_TRIES` tries."""
        words, view = self._memory.words, self._memory.view
        condition = _TORN
        for tries in range(READ_TRIES):
            sequence = words[self._word]
            if fence is not None:
                fence()
            payload = view[self._copies[sequence & 1]].tobytes()
            if fence is not None:
                fence()
            if words[self._word] != sequence:
                condition = _TORN
                continue
            record = self._decode(payload, sequence)
            if record is not None:
                if tries:
                    self._faults.add("retries", tries)
                return new_tuple(Reading, (_OK, record, sequence))
            condition = BlockCondition.DAMAGED
        self._faults.add("retries", READ_TRIES - 1)
        self._faults.add("torn" if condition is _TORN else "crc_failures")
        return Reading(condition, None, sequence)

    def write(self, payload: bytes, generation: int) -> None:
        """Publishes `payload`, encoded with `generation`, the successor of the last one."""
        self._memory.view[self._copies[generation & 1]] = payload
        if fence is not None:
            fence()
        self._memory.words[self._word] = generation
