"""The one emergency of the run: raises it on the board, reports it, collects acknowledgements, clears it.

Used on the event loop only; nothing here waits. The observer carries out what a level requires.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.emergency.broadcast import Broadcast, HeldBack, Notice, Outbox, RateLimit, new_notice
from tolaria.emergency.protocol import (
    RESPONSES,
    TOLARIA,
    TRIGGERS,
    Acknowledge,
    Acknowledgement,
    Clear,
    Clearer,
    EmergencyState,
    Move,
    PassDeadline,
    Phase,
    Raise,
    Reissue,
    Response,
    Trigger,
    move_of,
    require_level,
    transition,
)
from tolaria.errors import SignalError
from tolaria.signals import CLEARERS, Participant, Signal, SignalBoard

_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class BoardWrite:
    """One write to the board: its duration, and why it failed; empty when it did not."""

    latency_ns: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Escalated:
    """The level rose and `response` is required. `write` is None when a peer raised it on the board itself."""

    before: EmergencyState
    state: EmergencyState
    response: Response
    write: BoardWrite | None


@dataclass(frozen=True, slots=True)
class Covered:
    """A raise at or below the active level, which requires nothing further."""

    level: EmergencyLevel.ValueType
    reason: str
    origin: str


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A participant acted on the active emergency."""

    state: EmergencyState
    acknowledgement: Acknowledgement


@dataclass(frozen=True, slots=True)
class DeadlineMissed:
    """The level's deadline passed before `state.missing` acknowledged."""

    state: EmergencyState


@dataclass(frozen=True, slots=True)
class Reissued:
    """The active signal was gone from the board without a clearance, and was written again."""

    state: EmergencyState
    write: BoardWrite


@dataclass(frozen=True, slots=True)
class Cleared:
    """The emergency `before` is over. `write` is None when the operator cleared it on the board itself."""

    before: EmergencyState
    by: Clearer
    reason: str
    origin: str
    write: BoardWrite | None


@dataclass(frozen=True, slots=True)
class BoardUnreadable:
    """The board cannot be read, so signals of peers do not arrive. Reported once for each failure period."""

    error: str


Report = (
    Escalated | Covered | Broadcast | HeldBack | Acknowledged | DeadlineMissed | Reissued | Cleared | BoardUnreadable
)


@dataclass(frozen=True, slots=True)
class EmergencyPolicy:
    """Limits of the controller.

    Attributes:
        broadcasts_per_minute: as `emergency.broadcasts_per_minute`.
        held_reasons_max: distinct notices that may wait before they are merged.
        retry_s: pause after a failed broadcast.
        attached_s: age of a heartbeat up to which a participant counts as attached.
    """

    broadcasts_per_minute: int
    held_reasons_max: int = 256
    retry_s: float = 1.0
    attached_s: float = 10.0


@dataclass(frozen=True, slots=True)
class _BoardView:
    """The board at one moment. `error` says why it cannot be read; the rest is empty then.

    `acknowledgements` are the participants' last ones. `cleared_ns`: signals raised until then are cleared for all.
    """

    active: tuple[Signal, ...] = ()
    cleared_ns: int = 0
    acknowledgements: tuple[tuple[int, Acknowledge], ...] = ()
    attached: tuple[str, ...] = ()
    error: str = ""


class EmergencyController:
    """Holds the emergency of the run. The first `observe_board` adopts what is on the board already.

    Args:
        board: open; read here.
        participant: "tolaria", claimed on that board; written here.
        broadcast: hands a notice to telemetry at CRITICAL priority without waiting. Raises BroadcastFailedError when it
            cannot; that is reported and retried.
        observer: called with every report, after the state changed. May call `escalate` and `acknowledge`.
        policy: limits.
        clock: monotonic nanoseconds, as the board's own.
    """

    def __init__(
        self,
        board: SignalBoard,
        participant: Participant,
        *,
        broadcast: Callable[[Notice], None],
        observer: Callable[[Report], None],
        policy: EmergencyPolicy,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._board = board
        self._participant = participant
        self._observer = observer
        self._attached_ns = int(policy.attached_s * _S)
        self._clock = clock
        self._outbox = Outbox(
            broadcast,
            limit=RateLimit(policy.broadcasts_per_minute, 60 * _S),
            reasons_max=policy.held_reasons_max,
            retry_ns=int(policy.retry_s * _S),
            report=observer,
            clock=clock,
        )
        self._since_ns = clock()
        self._state = EmergencyState()
        self._seen: dict[str, int] = {}  # the last signal taken in of each participant
        self._unreadable = False
        self._reissue_failed = False

    @property
    def state(self) -> EmergencyState:
        """The emergency now."""
        return self._state

    @property
    def signals_waiting(self) -> int:
        """Signals that telemetry has not received yet."""
        return self._outbox.signals_waiting

    @property
    def due_in_s(self) -> float | None:
        """Seconds until `pump` has something to do; None when it has not before the next event."""
        times_ns = [at_ns for at_ns in (self._outbox.due_at_ns, self._deadline_ns()) if at_ns is not None]
        return max(0.0, (min(times_ns) - self._clock()) / _S) if times_ns else None

    def trigger(self, trigger: Trigger, detail: str) -> EmergencyState:
        """Raises the level of `trigger`; its value and `detail` become the reason."""
        return self.escalate(TRIGGERS[trigger], f"{trigger.value}: {detail}", TOLARIA)

    def escalate(self, level: EmergencyLevel.ValueType, reason: str, origin: str) -> EmergencyState:
        """Raises `level` and returns the state after it, whose level may be higher.

        Writes the board (microseconds) if the level rises, then calls the observer, then broadcasts or defers. A failed
        write is in the report and does not stop the emergency.

        Raises:
            UnknownLevelError: there is no such level; nothing has changed.
        """
        require_level(level)
        now_ns = self._clock()
        signal_id, write = 0, None
        if level > self._state.level:
            signal_id, write = self._raise_on_board(level, reason)
            if signal_id:
                self._seen[TOLARIA] = signal_id
        self._take_raise(Raise(level, reason, origin, signal_id, now_ns, self._view().attached), write)
        return self._state

    def acknowledge(self) -> None:
        """Records that tolaria has done all that the active level requires.

        Raises:
            IllegalEmergencyEventError: there is no emergency.
        """
        self._take_acknowledgement(Acknowledge(TOLARIA, self._clock()))
        active = self._view().active
        signal_id = active[0].signal_id if active else self._state.signal_id
        if signal_id:
            self._write(lambda: self._participant.acknowledge(signal_id))

    def clear(self, reason: str, origin: str, *, by: Clearer) -> EmergencyState:
        """Ends the emergency, here and on the board, and returns the state that it had.

        Waiting broadcasts are sent later all the same. A failed write is in the report: peers may still see the level.

        Raises:
            IllegalEmergencyEventError: there is no emergency.
            ClearanceRefusedError: the rule `by` may not end this one.
        """
        self.observe_board()
        level = self._state.level
        sources = tuple(signal.origin for signal in self._view().active if signal.level >= level)
        calm = transition(self._state, Clear(by, sources))
        return self._become_calm(calm, by, reason, origin, self._write(self._participant.clear_all))

    def observe_board(self) -> None:
        """Takes in what others wrote to the board: signals, acknowledgements, an operator's clearance.

        A signal that is gone without a clearance is written again: a level does not fall because its origin cleared
        its own signal, crashed or lost its block.
        """
        view = self._view()
        broke, self._unreadable = bool(view.error) and not self._unreadable, bool(view.error)
        if broke:
            self._observer(BoardUnreadable(view.error))
        if view.error:
            return
        if self._state.phase is not Phase.CALM and view.cleared_ns >= self._state.raised_ns:
            calm = transition(self._state, Clear(Clearer.OPERATOR, ()))
            self._become_calm(calm, Clearer.OPERATOR, "cleared on the board", "operator", None)
        for signal in sorted(view.active, key=lambda signal: signal.raised_ns):
            if self._seen.get(signal.origin) != signal.signal_id:
                self._seen[signal.origin] = signal.signal_id
                # It could be answered neither before this process existed, nor is it answered in the future.
                at_ns = min(max(signal.raised_ns, self._since_ns), self._clock())
                event = Raise(signal.level, signal.reason, signal.origin, signal.signal_id, at_ns, view.attached)
                self._take_raise(event, None)
        self._reissue_if_gone()
        self._collect_acknowledgements(view)

    def pump(self) -> None:
        """Does what is due: sends waiting notices and notices a passed deadline. Cheap when nothing is due."""
        deadline_ns = self._deadline_ns()
        if deadline_ns is not None and self._clock() >= deadline_ns:
            self._state = transition(self._state, PassDeadline(self._clock()))
            self._observer(DeadlineMissed(self._state))
        self._outbox.pump()

    def _take_raise(self, event: Raise, write: BoardWrite | None) -> None:
        before, move = self._state, move_of(self._state, event)
        self._state = transition(before, event)
        # Posted before the observer can raise another level, and sent after it: freezing training comes first.
        self._outbox.post(new_notice(event.level, event.reason, event.origin, event.at_ns))
        if move is Move.ESCALATE:
            self._reissue_failed = bool(write and write.error)
            self._observer(Escalated(before, self._state, RESPONSES[event.level], write))
        else:
            self._observer(Covered(event.level, event.reason, event.origin))
        self._outbox.pump()

    def _reissue_if_gone(self) -> None:
        state, view = self._state, self._view()  # read again: the observer may have raised a level
        gone = not view.error and not any(signal.level >= state.level for signal in view.active)
        if state.phase is Phase.CALM or not gone:
            return
        signal_id, write = self._raise_on_board(state.level, state.reason)
        failed_before, self._reissue_failed = self._reissue_failed, bool(write.error)
        if not write.error:
            self._seen[TOLARIA] = signal_id
            self._state = transition(state, Reissue(signal_id))
        if not (write.error and failed_before):  # retried at every look, reported once
            self._observer(Reissued(self._state, write))

    def _collect_acknowledgements(self, view: _BoardView) -> None:
        state = self._state
        if state.phase is Phase.CALM:
            return
        # When two participants raise at once, peers acknowledge the effective signal, which may not be this state's.
        valid = {signal.signal_id for signal in view.active if signal.level >= state.level} | {state.signal_id}
        known = {acknowledgement.participant for acknowledgement in state.acknowledgements}
        for signal_id, acknowledge in view.acknowledgements:
            if signal_id in valid and acknowledge.participant not in known:
                self._take_acknowledgement(acknowledge)

    def _take_acknowledgement(self, event: Acknowledge) -> None:
        before = self._state
        self._state = transition(before, event)
        if len(self._state.acknowledgements) > len(before.acknowledgements):
            self._observer(Acknowledged(self._state, self._state.acknowledgements[-1]))

    def _become_calm(
        self, calm: EmergencyState, by: Clearer, reason: str, origin: str, write: BoardWrite | None
    ) -> EmergencyState:
        before, self._state = self._state, calm
        self._observer(Cleared(before, by, reason, origin, write))
        return before

    def _deadline_ns(self) -> int | None:
        return self._state.deadline_ns if self._state.phase is Phase.RAISED else None

    def _view(self) -> _BoardView:
        """Reads the board; tens of microseconds."""
        try:
            active, states = self._board.active_signals(), self._board.read_all()
        except SignalError as error:
            return _BoardView(error=str(error))
        oldest_ns = self._clock() - self._attached_ns
        records = [(state.name, state.record) for state in states if state.record is not None]
        return _BoardView(
            active=active,
            cleared_ns=max((record.cleared_ns for name, record in records if name in CLEARERS), default=0),
            acknowledgements=tuple(
                (record.acknowledged_id, Acknowledge(name, record.acknowledged_ns))
                for name, record in records
                if record.acknowledged_id
            ),
            attached=tuple(state.name for state in states if state.heartbeat_ns >= max(1, oldest_ns)),
        )

    def _raise_on_board(self, level: EmergencyLevel.ValueType, reason: str) -> tuple[int, BoardWrite]:
        """Returns the signal's id, 0 when the write failed."""
        ids: list[int] = []
        write = self._write(lambda: ids.append(self._participant.raise_level(level, reason)))
        return (ids[0] if ids else 0), write

    def _write(self, write: Callable[[], None]) -> BoardWrite:
        began_ns, error = self._clock(), ""
        try:
            write()
        except SignalError as failure:
            error = str(failure)
        return BoardWrite(self._clock() - began_ns, error)
