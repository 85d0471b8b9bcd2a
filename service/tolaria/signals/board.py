"""The signal board: emergency levels, heartbeats and the rollback's state, shared through one mapped file.

with SignalBoard.attach("/dev/shm/tolaria-run1") as board:
me = board.claim("kasmina")
seen = board.bell
while board.current:
me.beat()
signal = board.effective()
if signal is not None and signal.signal_id != me.record.acknowledged_id:
me.acknowledge(signal.signal_id)
seen = board.wait(seen, timeout_s=1.0)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tolaria.errors import BlockOwnedError
from tolaria.signals.futex import Bell, futex_available
from tolaria.signals.layout import (
    BELL_AT,
    BLOCKS_AT,
    CLEARERS,
    CREATOR_INDEX,
    HEARTBEAT,
    LANE_HEARTBEAT,
    PARTICIPANT_PAYLOAD,
    PARTICIPANT_SIZE,
    PARTICIPANTS,
    ROLLBACK_AT,
    ROLLBACK_PAYLOAD,
    ParticipantRecord,
    RollbackRecord,
    Signal,
    active_signals,
    bell_value,
    cleared_until,
    decode_participant,
    decode_rollback,
    index_of,
    participant_at,
)
from tolaria.signals.mapping import BoardFile, BoardMemory, attach_file, create_file, remove_file
from tolaria.signals.seqlock import BoardStatistics, FaultCounter, ParticipantState, Seqlock
from tolaria.signals.writers import BoardParts, Participant, RollbackWriter

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
    cut short, except heartbeats, which are then counted as lost.

    Attributes:
        path: the board's file.
        run_id: of the run that created it.
        adopted: whether `create` took over the board of a crashed process of the same run.
        degraded: whether waiting polls every millisecond, as this platform has no futex (`shared_signal_degraded`).
    """

    def __init__(self, path: Path, file: BoardFile, *, creator: bool, clock: Callable[[], int]) -> None:
        self.path = path
        self.run_id = file.header.run_id
        self.adopted = file.adopted
        self.degraded = not futex_available()
        self._fd = file.fd
        self._creator = creator
        self._memory = BoardMemory(file.fd, path)
        self._faults = FaultCounter()
        self._bell = Bell(self._memory.view, BELL_AT, futex=not self.degraded)
        self._parts = BoardParts(self._memory, file.locks, self._bell, self._faults, clock)
        self._blocks = [self._participant_block(index) for index in range(len(PARTICIPANTS))]
        self._rollback = Seqlock[RollbackRecord](
            self._memory, ROLLBACK_AT, ROLLBACK_PAYLOAD, decode=decode_rollback, faults=self._faults
        )
        self._claimed: dict[str, Participant | RollbackWriter] = {}
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

    def claim(self, name: str) -> Participant:
        """Makes this process the writer of participant `name` (see PARTICIPANTS) until release, close or exit.

        Raises `BlockOwnedError` when it is claimed already, here or by another living process.
        """
        index = index_of(name)
        self._require_unclaimed(name)
        participant = Participant(name, self._parts, self._blocks[index], cleared_ns=self._cleared_ns)
        self._claimed[name] = participant
        return participant

    def claim_rollback(self) -> RollbackWriter:
        """Makes this process the writer of the rollback block. Raises as `claim` does."""
        self._require_unclaimed("rollback")
        writer = RollbackWriter(self._parts, self._rollback)
        self._claimed["rollback"] = writer
        return writer

    def effective(self) -> Signal | None:
        """Returns the active signal of the highest level; of equals, the one raised first. A few microseconds."""
        active = self.active_signals()
        return active[0] if active else None

    def active_signals(self) -> tuple[Signal, ...]:
        """Returns every signal raised and not cleared, the effective one first. Counts and skips unreadable blocks.

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
        reading = self._blocks[index].read()
        return ParticipantState(
            name, reading.condition, words[(at + HEARTBEAT) // 8], words[(at + LANE_HEARTBEAT) // 8], reading.record
        )

    def read_all(self) -> tuple[ParticipantState, ...]:
        """Returns every participant's block, in the board's order."""
        return tuple(self.read(name) for name in PARTICIPANTS)

    def read_rollback(self) -> RollbackRecord | None:
        """Returns the rollback block; None when it is torn or damaged (counted)."""
        self._memory.require_intact()
        return self._rollback.read().record

    def acknowledgements(self, signal_id: int) -> dict[str, int]:
        """Returns the participants that acknowledged a signal, with the times (monotonic ns)."""
        return {
            state.name: state.record.acknowledged_ns
            for state in self.read_all()
            if state.record is not None and state.record.acknowledged_id == signal_id
        }

    def statistics(self) -> BoardStatistics:
        """Returns the faults that this view saw."""
        return self._faults.statistics()

    def close(self, *, unlink: bool = False) -> None:
        """Ends this process's waits, releases its claims and unmaps; again is harmless.

        `unlink` also removes the file, unless its name leads to another board by now, and wakes the waiters of other
        processes. Other threads of this process may still be in `wait`, but not read or write.
        """
        if self._memory.closed:
            return
        if unlink:
            remove_file(self.path, self._fd)
            if self._memory.intact:
                self._bell.ring(bell_value(CREATOR_INDEX, self._bell.value + 1))  # woken waiters look at `current`
        self._bell.close()
        self._parts.locks.close()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the board; its creator removes the file too."""
        self.close(unlink=self._creator)

    def _refreshed(self, snapshot: _Snapshot, sequences: list[int]) -> _Snapshot:
        """Returns `snapshot` with the blocks whose sequence changed read again."""
        known, records = snapshot.sequences.copy(), snapshot.records.copy()
        for index, sequence in enumerate(sequences):
            if sequence != known[index]:
                _, record, sequence_read = self._blocks[index].read()
                known[index] = _UNREAD if record is None else sequence_read
                records[PARTICIPANTS[index]] = _EMPTY if record is None else record
        return _Snapshot(known, records, active_signals(records))

    def _participant_block(self, index: int) -> Seqlock[ParticipantRecord]:
        decode = partial(decode_participant, index=index)
        return Seqlock(self._memory, participant_at(index), PARTICIPANT_PAYLOAD, decode=decode, faults=self._faults)

    def _require_unclaimed(self, name: str) -> None:
        self._memory.require_intact()
        claimed = self._claimed.get(name)
        if claimed is not None and not claimed.released:
            raise BlockOwnedError(f"{name} is claimed by this process already")

    def _cleared_ns(self) -> int:
        readings = {name: self._blocks[index_of(name)].read() for name in CLEARERS}
        return cleared_until({name: found.record for name, found in readings.items() if found.record is not None})
