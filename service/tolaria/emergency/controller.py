"""The one emergency of the run: raises it on the board, reports it, collects acknowledgements, clears it.

Used on the event loop only; nothing here waits. The observer carries out what a level requires.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.emergency import protocol
from tolaria.emergency.broadcast import Backlog, Broadcast, HeldBack, Notice, Outbox, RateLimit, new_notice
from tolaria.emergency.protocol import TOLARIA, Acknowledgement, Clearer, EmergencyState, Phase, Response, Trigger
from tolaria.errors import SignalError
from tolaria.signals import ParticipantWriter, Signal, SignalBoard
from tolaria.signals.layout import ParticipantRecord, cleared_until

_S = 1_000_000_000
_RETRY_S = 1.0
_HELD_REASONS_MAX = 256
_FRESH_NS = 10 * _S  # age of a heartbeat up to which its participant counts as attached


@dataclass(frozen=True, slots=True)
class Escalated:
    """The level rose and `response` is required. `board_error`: why the board was not written; empty when it was."""

    state: EmergencyState
    response: Response
    board_error: str


@dataclass(frozen=True, slots=True)
class Covered:
    """A signal at or below the active level, which requires nothing further."""

    signal: Signal


@dataclass(frozen=True, slots=True)
class DeadlineMissed:
    """The level's deadline passed before `state.missing` acknowledged."""

    state: EmergencyState


@dataclass(frozen=True, slots=True)
class Reissued:
    """The active signal was gone from the board without a clearance and was written again, unless with an error."""

    board_error: str


@dataclass(frozen=True, slots=True)
class Cleared:
    """The emergency `before` is over. With a `board_error` peers may still see its level."""

    before: EmergencyState
    by: Clearer
    reason: str
    origin: str
    board_error: str = ""


@dataclass(frozen=True, slots=True)
class BoardUnreadable:
    """The board cannot be read, so signals of peers do not arrive. Reported once for each failure period."""

    error: str


Report = (
    Escalated | Covered | Broadcast | HeldBack | Acknowledgement | DeadlineMissed | Reissued | Cleared | BoardUnreadable
)


@dataclass(frozen=True, slots=True)
class _BoardView:
    """The board at one moment: active signals, intact records, participants whose heartbeat is fresh.

    `error` says why the board cannot be read; the rest is empty then.
    """

    active: tuple[Signal, ...] = ()
    records: Mapping[str, ParticipantRecord] = field(default_factory=dict)
    attached: tuple[str, ...] = ()
    error: str = ""


class EmergencyController:
    """Keeps the emergency of the run. The first `observe_board` adopts what is on the board already.

    `participant` is "tolaria", claimed on `board`; `clock` is the board's. `broadcast` passes a notice to telemetry
    without waiting. It raises BroadcastFailedError when it cannot; that is reported and retried after `retry_s`.
    `observer` is called with every report, after the state changed; it may call `escalate` and `acknowledge`.
    `attributes` returns what is added to each notice about the run at that moment.
    """

    def __init__(
        self,
        board: SignalBoard,
        participant: ParticipantWriter,
        *,
        broadcast: Callable[[Notice], None],
        observer: Callable[[Report], None],
        broadcasts_per_minute: int,
        retry_s: float = _RETRY_S,
        attributes: Callable[[], Mapping[str, str]] = dict,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._board = board
        self._participant = participant
        self._observer = observer
        self._clock = clock
        self._attributes = attributes
        self._outbox = Outbox(
            broadcast,
            limit=RateLimit(broadcasts_per_minute, 60 * _S),
            backlog=Backlog(_HELD_REASONS_MAX),
            retry_ns=int(retry_s * _S),
            report=observer,
            clock=clock,
        )
        self._since_ns = clock()
        self._state = EmergencyState()
        self._seen: dict[str, int] = {}  # the last signal read from each participant
        self._unreadable = False
        self._reissue_failed = False

    @property
    def state(self) -> EmergencyState:
        """The emergency now."""
        return self._state

    @property
    def due_in_s(self) -> float | None:
        """Seconds until `pump` has something to do; None if it has nothing to do before the next event."""
        times_ns = [at_ns for at_ns in (self._outbox.due_at_ns, self._deadline_ns()) if at_ns is not None]
        return max(0.0, (min(times_ns) - self._clock()) / _S) if times_ns else None

    def trigger(self, trigger: Trigger, detail: str) -> EmergencyState:
        """Raises the level of `trigger`; its value and `detail` become the reason."""
        return self.escalate(protocol.TRIGGERS[trigger], f"{trigger.value}: {detail}", TOLARIA)

    def escalate(self, level: EmergencyLevel.ValueType, reason: str, origin: str) -> EmergencyState:
        """Raises `level` and returns the state after it, whose level may be higher.

        Writes the board (microseconds) if the level rises, then calls the observer, then broadcasts or defers. A failed
        write is in the report and does not stop the emergency. Raises `UnknownLevelError` before anything changes.
        """
        protocol.require_level(level)
        now_ns = self._clock()
        signal_id, error = self._raise_on_board(level, reason) if level > self._state.level else (0, "")
        self._take_signal(Signal(origin, level, reason, signal_id, now_ns), self._view().attached, error)
        return self._state

    def acknowledge(self) -> None:
        """Records that tolaria has done all that the level requires. Raises `IllegalEmergencyEventError` when calm."""
        self._take_acknowledgement(TOLARIA, self._clock())
        active = self._view().active
        signal_id = active[0].signal_id if active else self._state.signal_id
        if signal_id:
            with suppress(SignalError):  # `observe_board` reports a lost board
                self._participant.acknowledge(signal_id)

    def clear(self, reason: str, origin: str, *, by: Clearer) -> EmergencyState:
        """Ends the emergency, here and on the board, and returns the state that it had.

        Waiting broadcasts are still sent later. A failed write is in the report: peers may still see the level.
        Raises `ClearanceRefusedError` when the rule `by` may not end this one, `IllegalEmergencyEventError` when calm.
        """
        self.observe_board()
        before = self._state
        sources = tuple(signal.origin for signal in self._view().active if signal.level >= before.level)
        self._state = protocol.cleared(before, by, sources)
        error = ""
        try:
            self._participant.clear_all()
        except SignalError as failure:
            error = str(failure)
        self._observer(Cleared(before, by, reason, origin, error))
        return before

    def observe_board(self) -> None:
        """Reads what others wrote to the board: signals, acknowledgements, an operator's clearance.

        A signal that is gone without a clearance is written again: a level does not fall because its origin cleared
        its own signal, crashed or lost its block.
        """
        view = self._view()
        broke, self._unreadable = bool(view.error) and not self._unreadable, bool(view.error)
        if broke:
            self._observer(BoardUnreadable(view.error))
        if view.error:
            return
        before = self._state
        if before.phase is not Phase.CALM and cleared_until(view.records) >= before.raised_ns:
            self._state = protocol.cleared(before, Clearer.OPERATOR, ())
            self._observer(Cleared(before, Clearer.OPERATOR, "cleared on the board", "operator"))
        for signal in sorted(view.active, key=lambda signal: signal.raised_ns):
            if self._seen.get(signal.origin) != signal.signal_id:
                self._seen[signal.origin] = signal.signal_id
                # Its deadline must start neither before this process did nor in the future.
                at_ns = min(max(signal.raised_ns, self._since_ns), self._clock())
                self._take_signal(signal._replace(raised_ns=at_ns), view.attached, "")
        self._reissue_if_gone()
        self._collect_acknowledgements(view)

    def pump(self) -> None:
        """Does what is due: sends waiting notices and reports a missed deadline. Cheap when nothing is due."""
        now_ns, deadline_ns = self._clock(), self._deadline_ns()
        if deadline_ns is not None and now_ns >= deadline_ns:
            self._state = protocol.overdue(self._state, now_ns)
            self._observer(DeadlineMissed(self._state))
        self._outbox.pump()

    def _take_signal(self, signal: Signal, attached: tuple[str, ...], board_error: str) -> None:
        before, self._state = self._state, protocol.raised(self._state, signal, attached)
        # Posted before the observer can raise another level, and sent after it: freezing training comes first.
        self._outbox.post(self._notice_of(signal))
        if self._state is before:
            self._observer(Covered(signal))
        else:
            self._reissue_failed = bool(board_error)
            self._observer(Escalated(self._state, protocol.RESPONSES[signal.level], board_error))
        self._outbox.pump()

    def _notice_of(self, signal: Signal) -> Notice:
        triggered_ns = time.time_ns() - (self._clock() - signal.raised_ns)
        attributes = self._attributes()
        return new_notice(signal, run_id=self._board.run_id, triggered_unix_ns=triggered_ns, attributes=attributes)

    def _reissue_if_gone(self) -> None:
        state, view = self._state, self._view()  # read again: the observer may have raised a level
        gone = not view.error and not any(signal.level >= state.level for signal in view.active)
        if state.phase is Phase.CALM or not gone:
            return
        signal_id, error = self._raise_on_board(state.level, state.reason)
        failed_before, self._reissue_failed = self._reissue_failed, bool(error)
        if not error:
            self._state = replace(state, signal_id=signal_id)
        if not (error and failed_before):  # retried at every reading, reported once
            self._observer(Reissued(error))

    def _collect_acknowledgements(self, view: _BoardView) -> None:
        state = self._state
        if state.phase is Phase.CALM:
            return
        # When two participants raise at once, peers acknowledge the effective signal, which may not be this state's.
        valid = {signal.signal_id for signal in view.active if signal.level >= state.level} | {state.signal_id}
        for name, record in view.records.items():
            if record.acknowledged_id and record.acknowledged_id in valid:
                self._take_acknowledgement(name, record.acknowledged_ns)

    def _take_acknowledgement(self, participant: str, at_ns: int) -> None:
        before, self._state = self._state, protocol.acknowledged(self._state, participant, at_ns)
        if self._state is not before:
            self._observer(self._state.acknowledgements[-1])

    def _deadline_ns(self) -> int | None:
        return self._state.deadline_ns if self._state.phase is Phase.RAISED else None

    def _view(self) -> _BoardView:
        """Reads the board; tens of microseconds."""
        try:
            active, states = self._board.active_signals(), self._board.read_all()
        except SignalError as error:
            return _BoardView(error=str(error))
        oldest_ns = max(1, self._clock() - _FRESH_NS)
        return _BoardView(
            active=active,
            records={state.name: state.record for state in states if state.record is not None},
            attached=tuple(state.name for state in states if state.heartbeat_ns >= oldest_ns),
        )

    def _raise_on_board(self, level: EmergencyLevel.ValueType, reason: str) -> tuple[int, str]:
        """Returns the signal's id, 0 when the write failed, and why it failed."""
        try:
            signal_id = self._seen[TOLARIA] = self._participant.raise_level(level, reason)
        except SignalError as error:
            return 0, str(error)
        return signal_id, ""
