"""The signal board: emergency levels, heartbeats and the rollback's state, shared through one mapped file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from tolaria.signals.futex import Bell, futex_available
from tolaria.signals.layout import (
    BELL_AT,
    BLOCKS_AT,
    CREATOR_INDEX,
    HEARTBEAT,
    LANE_HEARTBEAT,
    PARTICIPANT_PAYLOAD,
    PARTICIPANT_SIZE,
    PARTICIPANTS,
    ROLLBACK_AT,
    ROLLBACK_INDEX,
    ROLLBACK_PAYLOAD,
    ParticipantRecord,
    RollbackRecord,
    Signal,
    active_signals,
    bell_value,
    decode_participant,
    decode_rollback,
    encode_participant,
    encode_rollback,
    index_of,
    participant_at,
)
from tolaria.signals.mapping import BoardFile, BoardMemory, attach_file, create_file
from tolaria.signals.seqlock import ParticipantState, Seqlock
from tolaria.signals.writers import BoardParts, ParticipantWriter, RollbackWriter

_SEQUENCES = slice(BLOCKS_AT // 8, ROLLBACK_AT // 8, PARTICIPANT_SIZE // 8)
_UNREAD = -1
_EMPTY = ParticipantRecord()


class _Snapshot(NamedTuple):
    """The participants as last read: sequences (`_UNREAD` where the read failed), records, active signals.

    Replaced, never changed, so any thread may read it.
    """

    sequences: list[int]
    records: dict[str, ParticipantRecord]
    active: tuple[Signal, ...]


class SignalBoard:
    """One process's view of a board, made by `create` or `attach`; a context manager that closes it.

    Any thread may read, wait and claim. Everything raises `BoardLostError` once the board is closed or its file was
    cut short, except heartbeats, which are then dropped.

    Attributes:
        path: the board's file.
        run_id: the run that created it.
        adopted: whether `create` took over the board of a crashed process of the same run.
        degraded: whether waiting polls every millisecond, as this platform has no futex (`shared_signal_degraded`).
    """

    def __init__(self, path: Path, file: BoardFile, *, creator: bool, clock: Callable[[], int]) -> None:
        self.path = path
        self.run_id = file.header.run_id
        self.adopted = file.adopted
        self.degraded = not futex_available()
        self._creator = creator
        self._memory = BoardMemory(file.fd, path)
        self._bell = Bell(self._memory.view, BELL_AT, futex=not self.degraded)
        self._parts = BoardParts(
            memory=self._memory,
            locks=file.locks,
            bell=self._bell,
            blocks=tuple(_participant_block(self._memory, index) for index in range(len(PARTICIPANTS))),
            rollback=_rollback_block(self._memory),
            clock=clock,
        )
        self._snapshot = _Snapshot([_UNREAD] * len(PARTICIPANTS), dict.fromkeys(PARTICIPANTS, _EMPTY), ())

    @classmethod
    def create(cls, path: str | os.PathLike[str], run_id: str, *, clock: Callable[[], int] = time.monotonic_ns) -> Self:
        """Creates the board of `run_id` at `path`, mode 0600, for the lifetime of this process.

        Adopts the board that a crash of the same run left, with all its signals, and replaces one of another run.
        Raises `BoardBusyError` while another living process is the creator, `BoardRefusedError` when the name cannot
        be used or leads to another kind of file, `SignalValueError` when the run id is empty or over 128 bytes of
        UTF-8.
        """
        return cls(Path(path), create_file(Path(path), run_id), creator=True, clock=clock)

    @classmethod
    def attach(
        cls,
        path: str | os.PathLike[str],
        expected_run_id: str | None = None,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> Self:
        """Opens an existing board. Raises `BoardRefusedError` with its reason: missing, truncated, version, run..."""
        return cls(Path(path), attach_file(Path(path), expected_run_id), creator=False, clock=clock)

    @property
    def current(self) -> bool:
        """Whether other processes can find this board; after it was removed or replaced, attach again."""
        return self._memory.named

    @property
    def bell(self) -> int:
        """A number that changes with every publication except heartbeats: load it, read the board, `wait` on it."""
        self._memory.require_intact()
        return self._bell.value

    def wait(self, seen: int, timeout_s: float) -> int:
        """Blocks this thread, without the GIL, until `bell` differs from `seen` or the timeout; returns `bell`.

        `close` ends it early. Timeouts follow the monotonic clock.
        """
        self._memory.require_intact()
        return self._bell.wait(seen, timeout_s)

    def claim(self, name: str) -> ParticipantWriter:
        """Makes this process the writer of participant `name` (see PARTICIPANTS) until release, close or exit.

        Raises `BlockOwnedError` when it is claimed already, here or by another living process.
        """
        self._memory.require_intact()
        return ParticipantWriter(name, self._parts)

    def claim_rollback(self) -> RollbackWriter:
        """Makes this process the writer of the rollback block. Raises as `claim` does."""
        self._memory.require_intact()
        return RollbackWriter(self._parts)

    def effective(self) -> Signal | None:
        """Returns the active signal of the highest level; of equals, the one raised first. A few microseconds."""
        active = self.active_signals()
        return active[0] if active else None

    def active_signals(self) -> tuple[Signal, ...]:
        """Returns every signal raised and not cleared, the effective one first. Skips unreadable blocks.

        A block is decoded again only when its sequence changed: a record that was read survives later damage.
        """
        self._memory.require_intact()
        sequences = self._memory.words[_SEQUENCES].tolist()
        snapshot = self._snapshot
        if sequences != snapshot.sequences:
            snapshot = self._snapshot = self._refreshed(snapshot, sequences)
        return snapshot.active

    def read(self, name: str) -> ParticipantState:
        """Returns one participant's block as its bytes are now. Raises `SignalValueError` for an unknown name."""
        index = index_of(name)
        self._memory.require_intact()
        words, at = self._memory.words, participant_at(index)
        reading = self._parts.blocks[index].read()
        return ParticipantState(
            name, reading.condition, words[(at + HEARTBEAT) // 8], words[(at + LANE_HEARTBEAT) // 8], reading.record
        )

    def read_all(self) -> tuple[ParticipantState, ...]:
        """Returns every participant's block, in the board's order."""
        return tuple(self.read(name) for name in PARTICIPANTS)

    def read_rollback(self) -> RollbackRecord | None:
        """Returns the rollback block; None when it is torn or damaged."""
        self._memory.require_intact()
        return self._parts.rollback.read().record

    def close(self, *, unlink: bool = False) -> None:
        """Ends this process's waits, releases its claims and unmaps. Closing again is harmless.

        `unlink` also removes the file, unless its name leads to another board by now, and wakes the waiters of other
        processes. Other threads of this process may still be in `wait`, but not read or write.
        """
        if self._memory.closed:
            return
        if unlink:
            self._memory.unlink()
            if self._memory.intact:
                self._bell.ring(bell_value(CREATOR_INDEX, self._bell.value + 1))  # woken waiters look at `current`
        self._bell.close()
        self._parts.locks.close()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the board; its creator removes the file too."""
        self.close(unlink=self._creator)

    def _refreshed(self, snapshot: _Snapshot, sequences: list[int]) -> _Snapshot:
        """Returns `snapshot` with the blocks whose sequence changed read again."""
        known, records = snapshot.sequences.copy(), snapshot.records.copy()
        for index, sequence in enumerate(sequences):
            if sequence != known[index]:
                _, record, sequence_read = self._parts.blocks[index].read()
                known[index] = _UNREAD if record is None else sequence_read
                records[PARTICIPANTS[index]] = _EMPTY if record is None else record
        return _Snapshot(known, records, active_signals(records))


def _participant_block(memory: BoardMemory, index: int) -> Seqlock[ParticipantRecord]:
    encode, decode = partial(encode_participant, index), partial(decode_participant, index=index)
    return Seqlock(memory, index, participant_at(index), PARTICIPANT_PAYLOAD, encode=encode, decode=decode)


def _rollback_block(memory: BoardMemory) -> Seqlock[RollbackRecord]:
    return Seqlock(
        memory, ROLLBACK_INDEX, ROLLBACK_AT, ROLLBACK_PAYLOAD, encode=encode_rollback, decode=decode_rollback
    )
