"""One block of the board: two copies of a payload under a sequence, for one writer and many readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, unique
from typing import Generic, NamedTuple, TypeVar

from tolaria.signals.layout import LINE, LaneWork, ParticipantRecord, new_tuple
from tolaria.signals.mapping import BoardMemory, fence

READ_TRIES = 16
"""Tries of one read, so that a busy writer cannot block a reader."""

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
    """A block as read; `record` is None unless `condition` is OK.

    Heartbeats (monotonic ns) and the work of the lane are always valid.
    """

    name: str
    condition: BlockCondition
    heartbeat_ns: int
    lane_heartbeat_ns: int
    record: ParticipantRecord | None
    lane_work: LaneWork


class Reading(NamedTuple, Generic[Record]):
    """Result of a read. `record` is None unless `condition` is OK."""

    condition: BlockCondition
    record: Record | None
    sequence: int


class Seqlock(Generic[Record]):
    """Block number `index` of the board, at offset `at`, with payloads of `size` bytes.

    `encode(generation, record)` returns a payload, `decode(payload, generation)` None for a damaged one. `extent` is
    the block's (offset, size). Any thread may `read`; only one thread of the process that owns the block may `write`.
    """

    def __init__(
        self,
        memory: BoardMemory,
        index: int,
        at: int,
        size: int,
        *,
        encode: Callable[[int, Record], bytes],
        decode: Callable[[bytes, int], Record | None],
    ) -> None:
        self.index = index
        self.extent = (at, LINE + 2 * size)
        self._memory = memory
        self._word = at // 8
        self._copies = (slice(at + LINE, at + LINE + size), slice(at + LINE + size, at + LINE + 2 * size))
        self._encode, self._decode = encode, decode

    def read(self) -> Reading[Record]:
        """Reads the current payload, in at most `READ_TRIES` tries."""
        words, view = self._memory.words, self._memory.view
        for _ in range(READ_TRIES):
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
                return new_tuple(Reading, (_OK, record, sequence))
            condition = BlockCondition.DAMAGED
        return Reading(condition, None, sequence)

    def write(self, generation: int, record: Record) -> None:
        """Publishes `record`. `generation` is the successor of the current sequence."""
        self._memory.view[self._copies[generation & 1]] = self._encode(generation, record)
        if fence is not None:
            fence()
        self._memory.words[self._word] = generation
