"""The signal board: emergency levels, heartbeats and the rollback's state, shared through one mapped file.

Owns opening, reading, waiting and closing. Knows nothing of what an emergency means or who acts on it: that is for
the callers.

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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from tolaria.errors import BlockOwnedError
from tolaria.signals import founding
from tolaria.signals.futex import Bell, futex_available
from tolaria.signals.latch import BoardStatistics, Latch, Tally
from tolaria.signals.layout import (
    BELL_AT,
    BLOCKS_AT,
    FOUNDER_INDEX,
    HEARTBEAT,
    LANE_HEARTBEAT,
    PARTICIPANT_PAYLOAD,
    PARTICIPANT_SIZE,
    PARTICIPANTS,
    ROLLBACK_AT,
    ROLLBACK_INDEX,
    ROLLBACK_PAYLOAD,
    bell_value,
    decode_participant,
    decode_rollback,
    index_of,
    participant_at,
)
from tolaria.signals.memory import BoardMemory
from tolaria.signals.owned import BoardParts, Participant, RollbackWriter, claim_participant, claim_rollback
from tolaria.signals.records import (
    CLEARERS,
    ParticipantRecord,
    ParticipantState,
    RollbackRecord,
    Signal,
    standing_signals,
    voided_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_SEQUENCES = slice(BLOCKS_AT // 8, ROLLBACK_AT // 8, PARTICIPANT_SIZE // 8)
_UNREAD = -1
_NOTHING = ParticipantRecord()


class _Seen(NamedTuple):
    """The last look at all participants: the sequence of each, `_UNREAD` for one without a record, and what it said.

    Never changed, only replaced: any thread may look.
    """

    sequences: list[int]
    records: dict[str, ParticipantRecord]
    standing: tuple[Signal, ...]


class SignalBoard:
    """One process's view of a board, made by `create` or `attach`; a context manager that closes it at its end.

    Any thread may read, wait and claim. Everything raises `BoardLostError` once the board is closed or its file was
    cut short, but heartbeats, which are dropped and counted.
    """

    def __init__(self, path: Path, file: founding.BoardFile, *, founder: bool, clock: Callable[[], int]) -> None:
        self.path = path
        self.run_id = file.header.run_id
        self.adopted = file.adopted
        self._fd = file.fd
        self._founder = founder
        self._memory = BoardMemory(file.fd, path)
        self._degraded = not futex_available()
        self._tally = Tally()
        self._bell = Bell(self._memory.view, BELL_AT, futex=not self._degraded)
        self._parts = BoardParts(self._memory, file.locks, self._bell, self._tally, clock)
        self._latches = [self._participant_latch(index) for index in range(len(PARTICIPANTS))]
        self._rollback = Latch[RollbackRecord](
            self._memory, ROLLBACK_AT, ROLLBACK_PAYLOAD, decode=decode_rollback, tally=self._tally
        )
        self._claimed: dict[str, Participant | RollbackWriter] = {}
        self._seen = _Seen([_UNREAD] * len(PARTICIPANTS), dict.fromkeys(PARTICIPANTS, _NOTHING), ())

    @classmethod
    def create(cls, path: str | os.PathLike[str], run_id: str, *, clock: Callable[[], int] = time.monotonic_ns) -> Self:
        """Found the board of `run_id` at `path`, mode 0600, for as long as this process lives.

        One that a crash of the same run left is taken over with all that it says (`adopted`); one of another run is
        replaced. Raises `BoardBusyError` while another living process holds it, `BoardRefusedError` when the name
        cannot be had or leads to something else than a board, `SignalValueError` when the run id is empty or over 128
        bytes of UTF-8.
        """
        return cls(Path(path), founding.found(Path(path), run_id), founder=True, clock=clock)

    @classmethod
    def attach(
        cls,
        path: str | os.PathLike[str],
        expected_run_id: str | None = None,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> Self:
        """Join a board that exists. Raises `BoardRefusedError` with its reason: missing, truncated, version, run..."""
        return cls(Path(path), founding.join(Path(path), expected_run_id), founder=False, clock=clock)

    @property
    def degraded(self) -> bool:
        """Whether waiting polls every millisecond, as this platform has no futex (`shared_signal_degraded`)."""
        return self._degraded

    @property
    def current(self) -> bool:
        """Whether this is still a board that others can find; false once it was removed or replaced: attach anew."""
        return self._memory.named

    @property
    def bell(self) -> int:
        """A number that changes with all that is published but heartbeats: look before reading, then `wait` on it."""
        self._memory.require_intact()
        return self._bell.value

    def wait(self, seen: int, timeout_s: float) -> int:
        """Block this thread, without the GIL, until `bell` is not `seen` or the timeout is over; returns `bell`.

        The process's own `close` ends it early. Clock changes do not matter.
        """
        self._memory.require_intact()
        return self._bell.wait(seen, timeout_s)

    def claim(self, name: str) -> Participant:
        """Become the one writer of participant `name` (see PARTICIPANTS) until released, closed or dead.

        Raises `BlockOwnedError` when it is claimed already, here or by another living process.
        """
        index = index_of(name)
        self._require_unclaimed(name)
        participant = claim_participant(name, index, self._latches[index], parts=self._parts, voided_ns=self._voided_ns)
        self._claimed[name] = participant
        return participant

    def claim_rollback(self) -> RollbackWriter:
        """Become the one writer of the rollback block; for tolaria's process. Raises as `claim` does."""
        self._require_unclaimed("rollback")
        writer = claim_rollback(ROLLBACK_INDEX, self._rollback, self._parts)
        self._claimed["rollback"] = writer
        return writer

    def effective(self) -> Signal | None:
        """The signal that counts: the highest standing level, the first raised of equals. A few microseconds."""
        standing = self.standing()
        return standing[0] if standing else None

    def standing(self) -> tuple[Signal, ...]:
        """Every signal raised and not void, the effective one first. Torn and damaged blocks are counted and left out.

        A block is decoded again only when its sequence moved, so what was read whole once survives later damage.
        """
        self._memory.require_intact()
        sequences = self._memory.words[_SEQUENCES].tolist()
        seen = self._seen
        if sequences != seen.sequences:
            seen = self._seen = self._look_again(seen, sequences)
        return seen.standing

    def read(self, name: str) -> ParticipantState:
        """One participant's block as its bytes are now. Raises `SignalValueError` for an unknown name."""
        index = index_of(name)
        self._memory.require_intact()
        words, at = self._memory.words, participant_at(index)
        reading = self._latches[index].read()
        return ParticipantState(
            name, reading.condition, words[(at + HEARTBEAT) // 8], words[(at + LANE_HEARTBEAT) // 8], reading.record
        )

    def read_all(self) -> tuple[ParticipantState, ...]:
        """Every participant's block, in the board's order."""
        return tuple(self.read(name) for name in PARTICIPANTS)

    def read_rollback(self) -> RollbackRecord | None:
        """What the rollback block says; None when it is torn or damaged (counted)."""
        self._memory.require_intact()
        return self._rollback.read().record

    def acknowledgements(self, signal_id: int) -> dict[str, int]:
        """Who has acknowledged a signal, and when (monotonic ns)."""
        return {
            state.name: state.record.acknowledged_ns
            for state in self.read_all()
            if state.record is not None and state.record.acknowledged_id == signal_id
        }

    def statistics(self) -> BoardStatistics:
        """What this view has seen go wrong so far."""
        return self._tally.statistics()

    def close(self, *, unlink: bool = False) -> None:
        """Send waiters home, let claims go and unmap; `unlink` also removes the file and wakes the waiters of others.

        A name that leads to another board by now is left alone. Again is harmless. Other threads of this process must
        not read or write any more; they may still sit in `wait`.
        """
        if self._memory.closed:
            return
        if unlink:
            founding.remove(self.path, self._fd)
            if self._memory.intact:
                self._bell.ring(bell_value(FOUNDER_INDEX, self._bell.value + 1))  # they see `current`
        self._bell.close()
        self._parts.locks.close()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; the founder takes the file away too."""
        self.close(unlink=self._founder)

    def _look_again(self, seen: _Seen, sequences: list[int]) -> _Seen:
        """What stands now: `seen`, but for the blocks whose sequence is another one by now."""
        known, records = seen.sequences.copy(), seen.records.copy()
        for index, sequence in enumerate(sequences):
            if sequence != known[index]:
                _, record, sequence_read = self._latches[index].read()
                known[index] = _UNREAD if record is None else sequence_read
                records[PARTICIPANTS[index]] = _NOTHING if record is None else record
        return _Seen(known, records, standing_signals(records))

    def _participant_latch(self, index: int) -> Latch[ParticipantRecord]:
        decode = partial(decode_participant, index=index)
        return Latch(self._memory, participant_at(index), PARTICIPANT_PAYLOAD, decode=decode, tally=self._tally)

    def _require_unclaimed(self, name: str) -> None:
        self._memory.require_intact()
        claimed = self._claimed.get(name)
        if claimed is not None and not claimed.released:
            raise BlockOwnedError(f"{name} is claimed by this process already")

    def _voided_ns(self) -> int:
        readings = {name: self._latches[index_of(name)].read() for name in CLEARERS}
        return voided_until({name: found.record for name, found in readings.items() if found.record is not None})
