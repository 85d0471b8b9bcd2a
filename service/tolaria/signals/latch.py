"""One block of the board: two copies of a payload under a sequence. Owns the protocol of one writer, many readers."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from tolaria.signals.layout import LINE
from tolaria.signals.memory import fence
from tolaria.signals.records import BlockCondition, new_tuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from tolaria.signals.memory import BoardMemory

READ_TRIES = 16
_OK, _TORN = BlockCondition.OK, BlockCondition.TORN  # a look at an enum's member costs more than one at the board

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class BoardStatistics:
    """What this process saw: reads retried, blocks reported torn, blocks ignored as damaged, beats not written."""

    retries: int
    torn: int
    crc_failures: int
    lost_beats: int


class Tally:
    """Counts faults for `BoardStatistics`; any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {"retries": 0, "torn": 0, "crc_failures": 0, "lost_beats": 0}

    def add(self, fault: str, count: int = 1) -> None:
        """Count `fault`, one of the fields of `BoardStatistics`."""
        with self._lock:
            self._counts[fault] += count

    def statistics(self) -> BoardStatistics:
        """The counts so far."""
        with self._lock:
            return BoardStatistics(**self._counts)


class Reading(NamedTuple, Generic[Record]):
    """What a read found: the record when `condition` is OK, else None; and the sequence it was read under."""

    condition: BlockCondition
    record: Record | None
    sequence: int


class Latch(Generic[Record]):
    """The block at offset `at` with payloads of `size` bytes; `decode(payload, generation)` gives None when damaged.

    `extent` is the block's (offset, size). `read` may be called from any thread, `write` by one thread at a time of the
    one process that owns the block.
    """

    def __init__(
        self, memory: BoardMemory, at: int, size: int, *, decode: Callable[[bytes, int], Record | None], tally: Tally
    ) -> None:
        self._memory = memory
        self.extent = (at, LINE + 2 * size)
        self._word = at // 8
        self._copies = (slice(at + LINE, at + LINE + size), slice(at + LINE + size, at + LINE + 2 * size))
        self._decode = decode
        self._tally = tally

    @property
    def sequence(self) -> int:
        """Generation of the current payload: changes with every write."""
        return self._memory.words[self._word]

    def read(self) -> Reading[Record]:
        """The current payload; at most `READ_TRIES` times, so a reader is never held up by a writer."""
        words, view = self._memory.words, self._memory.view
        condition = _TORN
        for tried in range(READ_TRIES):
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
                if tried:
                    self._tally.add("retries", tried)
                return new_tuple(Reading, (_OK, record, sequence))
            condition = BlockCondition.DAMAGED
        self._tally.add("retries", READ_TRIES - 1)
        self._tally.add("torn" if condition is _TORN else "crc_failures")
        return Reading(condition, None, sequence)

    def write(self, payload: bytes, generation: int) -> None:
        """Publish `payload`, sealed with `generation`, the successor of the last one."""
        self._memory.view[self._copies[generation & 1]] = payload
        if fence is not None:
            fence()
        self._memory.words[self._word] = generation
