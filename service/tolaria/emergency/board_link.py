"""The controller's side of the signal board: what it says in one look, and writes whose failures are data.

Owns the translation of the board's errors. Must not decide anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.emergency.reports import BoardWrite
from tolaria.errors import SignalError
from tolaria.signals import CLEARERS, Participant, ParticipantState, Signal, SignalBoard


@dataclass(frozen=True, slots=True)
class BoardAcknowledgement:
    """The last signal that a participant has acknowledged on the board."""

    participant: str
    signal_id: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class BoardView:
    """The board in one look. `error` says why there was none; then all else is empty.

    `voided_ns`: signals raised until then were cleared for all. `attached`: participants whose heart beats.
    """

    standing: tuple[Signal, ...] = ()
    voided_ns: int = 0
    acknowledgements: tuple[BoardAcknowledgement, ...] = ()
    attached: tuple[str, ...] = ()
    error: str = ""


class BoardLink:
    """Reads `board` and writes `participant`, tolaria's own block.

    Args:
        board: stays open as long as this is used, or fails each call.
        participant: claimed on that board.
        attached_ns: a participant that has not beaten for longer is not there.
        clock: monotonic nanoseconds, as the board's own.
    """

    def __init__(
        self, board: SignalBoard, participant: Participant, *, attached_ns: int, clock: Callable[[], int]
    ) -> None:
        self._board = board
        self._participant = participant
        self._attached_ns = attached_ns
        self._clock = clock

    def view(self) -> BoardView:
        """What the board says now; tens of microseconds."""
        try:
            standing, states = self._board.standing(), self._board.read_all()
        except SignalError as error:
            return BoardView(error=str(error))
        records = [(state.name, state.record) for state in states if state.record is not None]
        return BoardView(
            standing=standing,
            voided_ns=max((record.cleared_ns for name, record in records if name in CLEARERS), default=0),
            acknowledgements=tuple(
                BoardAcknowledgement(name, record.acknowledged_id, record.acknowledged_ns)
                for name, record in records
                if record.acknowledged_id
            ),
            attached=tuple(state.name for state in states if self._beats(state)),
        )

    def raise_level(self, level: EmergencyLevel.ValueType, reason: str) -> tuple[int, BoardWrite]:
        """Raise it on the board; the signal's id, 0 when that failed."""
        ids: list[int] = []
        write = self._timed(lambda: ids.append(self._participant.raise_level(level, reason)))
        return (ids[0] if ids else 0), write

    def acknowledge(self, signal_id: int) -> BoardWrite:
        """Show on the board that tolaria has acted on a signal."""
        return self._timed(lambda: self._participant.acknowledge(signal_id))

    def clear_all(self) -> BoardWrite:
        """Void every signal on the board."""
        return self._timed(self._participant.clear_all)

    def _beats(self, state: ParticipantState) -> bool:
        return state.heartbeat_ns > 0 and self._clock() - state.heartbeat_ns <= self._attached_ns

    def _timed(self, write: Callable[[], None]) -> BoardWrite:
        began_ns, error = self._clock(), ""
        try:
            write()
        except SignalError as failure:
            error = str(failure)
        return BoardWrite(self._clock() - began_ns, error)
