"""The signal board: emergency levels, heartbeats and the rollback's state, shared through one mapped file."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from tolaria.signals import layout
from tolaria.signals.futex import Bell, futex_available
from tolaria.signals.layout import PARTICIPANTS, LaneWork, ParticipantRecord, RollbackRecord, Signal
from tolaria.signals.mapping import BoardFile, BoardMemory, attach_file, create_file
from tolaria.signals.seqlock import ParticipantState, Seqlock
from tolaria.signals.writers import BoardParts, ParticipantWriter, RollbackWriter

_SEQUENCES = slice(layout.BLOCKS_AT // 8, layout.ROLLBACK_AT // 8, layout.PARTICIPANT_SIZE // 8)
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
    cut short, except heartbeats, which are then dropped. `run_id` is the run that created it, `adopted` whether that
    took over the board of a crashed process, `degraded` whether waiting polls, as this platform has no futex.
    """

    def __init__(self, path: Path, file: BoardFile, *, creator: bool, clock: Callable[[], int]) -> None:
        self.path = path
        self.run_id = file.header.run_id
        self.adopted = file.adopted
        self.degraded = not futex_available()
        self._creator = creator
        self._memory = BoardMemory(file.fd, path)
        self._bell = Bell(self._memory.view, layout.BELL_AT, futex=not self.degraded)
        self._parts = BoardParts(
            memory=self._memory,
            locks=file.locks,
            bell=self._bell,
            blocks=tuple(self._participant_block(index) for index in range(len(PARTICIPANTS))),
            rollback=Seqlock(
                self._memory,
                layout.ROLLBACK_INDEX,
                layout.ROLLBACK_AT,
                layout.ROLLBACK_PAYLOAD,
                encode=layout.encode_rollback,
                decode=layout.decode_rollback,
            ),
            clock=clock,
        )
        self._snapshot = _Snapshot([_UNREAD] * len(PARTICIPANTS), dict.fromkeys(PARTICIPANTS, _EMPTY), ())

    @classmethod
    def create(cls, path: Path, run_id: str, *, clock: Callable[[], int] = time.monotonic_ns) -> Self:
        """Creates the board of `run_id` at `path`, mode 0600, for the lifetime of this process.

        Adopts the board that a crash of the same run left, with all its signals, and replaces one of another run.
        Raises `BoardBusyError` while another living process is the creator, `BoardRefusedError` when the name cannot
        be used, `SignalValueError` when the run id is empty or over 128 bytes of UTF-8.
        """
        return cls(path, create_file(path, run_id), creator=True, clock=clock)

    @classmethod
    def attach(cls, path: Path, run_id: str | None = None, *, clock: Callable[[], int] = time.monotonic_ns) -> Self:
        """Opens an existing board. Raises `BoardRefusedError` with its reason: missing, truncated, version, run..."""
        return cls(path, attach_file(path, run_id), creator=False, clock=clock)

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
        """Returns the active signal of the highest level; among equals, the one raised first. Takes microseconds."""
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
        index = layout.index_of(name)
        self._memory.require_intact()
        beat, lane_beat = layout.heartbeat_words(index)
        words, reading = self._memory.words, self._parts.blocks[index].read()
        work = LaneWork.of_word(words[layout.lane_work_word(index)])
        return ParticipantState(name, reading.condition, words[beat], words[lane_beat], reading.record, work)

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
                # Woken waiters look at `current`.
                self._bell.ring(layout.bell_value(layout.CREATOR_INDEX, self._bell.value + 1))
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
        return _Snapshot(known, records, layout.active_signals(records))

    def _participant_block(self, index: int) -> Seqlock[ParticipantRecord]:
        encode, decode = partial(layout.encode_participant, index), partial(layout.decode_participant, index=index)
        at, size = layout.participant_at(index), layout.PARTICIPANT_PAYLOAD
        return Seqlock(self._memory, index, at, size, encode=encode, decode=decode)
