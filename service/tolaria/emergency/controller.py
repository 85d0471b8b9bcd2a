"""The emergency as the service holds it: raises, tells, collects acknowledgements, clears.

Owns the one state and the order of effects: board, observer, telemetry. What a level asks for is done by the observer.
Used on the event loop only; nothing in here waits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT, EmergencyLevel
from tolaria.emergency.backlog import Notice, new_notice
from tolaria.emergency.board_link import BoardLink, BoardView
from tolaria.emergency.outbox import Outbox
from tolaria.emergency.protocol import (
    RESPONSES,
    TOLARIA,
    Acknowledge,
    Clear,
    Clearer,
    EmergencyState,
    Move,
    PassDeadline,
    Phase,
    Raise,
    Reissue,
    move_of,
    require_level,
    transition,
)
from tolaria.emergency.rate import RateCap
from tolaria.emergency.reports import (
    Acknowledged,
    BoardUnreadable,
    BoardWrite,
    Cleared,
    Covered,
    DeadlineMissed,
    EmergencyStatistics,
    Escalated,
    Reissued,
    Report,
)
from tolaria.emergency.triggers import TRIGGERS, Trigger
from tolaria.signals import Participant, Signal, SignalBoard

_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class EmergencyPolicy:
    """The controller's numbers; the settings of the same names tell their meaning."""

    broadcasts_per_minute: int = 60
    held_reasons_max: int = 256
    retry_s: float = 1.0
    attached_s: float = 10.0


class EmergencyController:
    """Holds the one emergency of the run.

    What stands on the board when it is made, from before a crash or from peers, is adopted by the first
    `observe_board`.

    Args:
        board: open; read here.
        participant: "tolaria", claimed on that board; written here.
        broadcast: hands a notice to telemetry at CRITICAL priority without waiting. Raises BroadcastFailedError when it
            cannot: that is reported, and it is tried again.
        observer: told of everything at once, the new state being in place; does what the level asks for. May call
            `escalate` and `acknowledge`.
        policy: numbers.
        clock: monotonic nanoseconds, as the board's own.
    """

    def __init__(
        self,
        board: SignalBoard,
        participant: Participant,
        *,
        broadcast: Callable[[Notice], None],
        observer: Callable[[Report], None],
        policy: EmergencyPolicy | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        policy = policy or EmergencyPolicy()
        self._link = BoardLink(board, participant, attached_ns=int(policy.attached_s * _S), clock=clock)
        self._outbox = Outbox(
            broadcast,
            cap=RateCap(policy.broadcasts_per_minute, 60 * _S),
            reasons_max=policy.held_reasons_max,
            retry_ns=int(policy.retry_s * _S),
            report=observer,
            clock=clock,
        )
        self._observer = observer
        self._clock = clock
        self._since_ns = clock()
        self._state = EmergencyState()
        self._seen: dict[str, int] = {}
        """The last signal of each participant that has been taken in: at most one for each block of the board."""
        self._unreadable = False
        self._reissue_failed = False
        self._counts: Counter[str] = Counter()
        self._last_board_latency_ns = 0

    # -- what stands ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> EmergencyState:
        """The emergency as it stands."""
        return self._state

    @property
    def due_in_s(self) -> float | None:
        """In how many seconds `pump` will have something to do; None: not before something happens."""
        times_ns = [at_ns for at_ns in (self._outbox.due_at_ns, self._deadline_ns()) if at_ns is not None]
        return max(0.0, (min(times_ns) - self._clock()) / _S) if times_ns else None

    def statistics(self) -> EmergencyStatistics:
        """Counts since the start."""
        counts, told = self._counts, self._outbox.counts
        return EmergencyStatistics(
            level=self._state.level,
            raised=told.posted,
            escalations=counts["escalations"],
            halts=counts["halts"],
            cleared=counts["cleared"],
            broadcasts=told.broadcasts,
            signals_told=told.signals_told,
            broadcast_failures=told.broadcast_failures,
            held_back=told.held_back,
            notices_waiting=self._outbox.notices_waiting,
            signals_waiting=self._outbox.signals_waiting,
            board_failures=counts["board_failures"],
            deadlines_missed=counts["deadlines_missed"],
            last_broadcast_latency_ns=told.last_latency_ns,
            last_board_latency_ns=self._last_board_latency_ns,
        )

    # -- what happens --------------------------------------------------------------------------------------------

    def trigger(self, trigger: Trigger, detail: str) -> EmergencyState:
        """Raise what `TRIGGERS` says; `detail` becomes part of the reason."""
        return self.escalate(TRIGGERS[trigger], f"{trigger.value}: {detail}", TOLARIA)

    def escalate(self, level: EmergencyLevel.ValueType, reason: str, origin: str) -> EmergencyState:
        """Raise `level`; the state after it, which may stand higher already.

        Writes the board (microseconds) if the level goes up, then tells the observer, then telemetry, or lets it wait.
        That the board cannot be written is in the report; the emergency stands all the same.

        Raises:
            UnknownLevelError: there is no such level; nothing has changed.
        """
        require_level(level)
        now_ns = self._clock()
        signal_id, write = 0, None
        if level > self._state.level:
            signal_id, write = self._link.raise_level(level, reason)
            self._written(write)
            if signal_id:
                self._seen[TOLARIA] = signal_id
        self._take_raise(Raise(level, reason, origin, signal_id, now_ns, self._link.view().attached), write)
        return self._state

    def acknowledge(self) -> None:
        """Tolaria has done all that the standing level asks for: training is frozen, for instance.

        Raises:
            IllegalEmergencyEventError: there is no emergency.
        """
        self._take_acknowledgement(Acknowledge(TOLARIA, self._clock()))
        standing = self._link.view().standing
        signal_id = standing[0].signal_id if standing else self._state.signal_id
        if signal_id:
            self._written(self._link.acknowledge(signal_id))

    def clear(self, reason: str, origin: str, *, by: Clearer) -> EmergencyState:
        """End the emergency, here and for everyone on the board; the state that it had.

        What waits to be told is told later all the same. That the board cannot be written is in the report: then
        peers may still see the level.

        Raises:
            IllegalEmergencyEventError: there is none.
            ClearanceRefusedError: `by` is a rule that may not end this one.
        """
        self.observe_board()
        sources = self._standing_sources()
        calm = transition(self._state, Clear(by, sources))
        write = self._link.clear_all()
        self._written(write)
        return self._become_calm(calm, by, reason, origin, write)

    # -- what the board says -------------------------------------------------------------------------------------

    def observe_board(self) -> None:
        """Take in what others have put on the board: signals, acknowledgements, an operator's clearance.

        A signal that has gone from the board without a clearance is put there again: levels do not go down because
        their origin has changed its mind, crashed, or lost its block.
        """
        view = self._link.view()
        self._tell_readability(view)
        if view.error:
            return
        if self._state.phase is not Phase.CALM and view.voided_ns >= self._state.raised_ns:
            calm = transition(self._state, Clear(Clearer.OPERATOR, ()))
            self._become_calm(calm, Clearer.OPERATOR, "cleared on the board", "operator", None)
        for signal in sorted(view.standing, key=lambda signal: signal.raised_ns):
            if self._seen.get(signal.origin) != signal.signal_id:
                self._seen[signal.origin] = signal.signal_id
                self._adopt(signal, view)
        self._reissue_if_gone()
        self._collect_acknowledgements(view)

    def pump(self) -> None:
        """Do what is due: tell of signals that wait, notice a deadline that has passed. Cheap when nothing is."""
        deadline_ns = self._deadline_ns()
        if deadline_ns is not None and self._clock() >= deadline_ns:
            self._state = transition(self._state, PassDeadline(self._clock()))
            self._counts["deadlines_missed"] += 1
            self._observer(DeadlineMissed(self._state))
        self._outbox.pump()

    def _adopt(self, signal: Signal, view: BoardView) -> None:
        # The time that counts is when it could first be answered: neither before this process, nor in the future.
        at_ns = min(max(signal.raised_ns, self._since_ns), self._clock())
        event = Raise(signal.level, signal.reason, signal.origin, signal.signal_id, at_ns, view.attached)
        self._take_raise(event, None)

    def _take_raise(self, event: Raise, write: BoardWrite | None) -> None:
        before, move = self._state, move_of(self._state, event)
        self._state = transition(before, event)
        # It takes its turn before the observer can raise another, and is told after: freezing training comes first.
        self._outbox.post(new_notice(event.level, event.reason, event.origin, event.at_ns))
        if move is Move.ESCALATE:
            self._counts["escalations"] += 1
            self._counts["halts"] += event.level == EMERGENCY_LEVEL_HALT
            self._reissue_failed = bool(write and write.error)
            self._observer(Escalated(before, self._state, RESPONSES[event.level], write))
        else:
            self._observer(Covered(event.level, event.reason, event.origin))
        self._outbox.pump()

    def _reissue_if_gone(self) -> None:
        state, view = self._state, self._link.view()  # a fresh look: the observer may have raised something
        gone = not view.error and not any(signal.level >= state.level for signal in view.standing)
        if state.phase is Phase.CALM or not gone:
            return
        signal_id, write = self._link.raise_level(state.level, state.reason)
        self._written(write)
        failed_before, self._reissue_failed = self._reissue_failed, bool(write.error)
        if not write.error:
            self._seen[TOLARIA] = signal_id
            self._state = transition(state, Reissue(signal_id))
        if not (write.error and failed_before):  # tried at every look, told once
            self._observer(Reissued(self._state, write))

    def _collect_acknowledgements(self, view: BoardView) -> None:
        state = self._state
        if state.phase is Phase.CALM:
            return
        # Where two raised at once, peers acknowledge the one that counts on the board, which may not be ours.
        valid = {signal.signal_id for signal in view.standing if signal.level >= state.level} | {state.signal_id}
        known = {acknowledgement.participant for acknowledgement in state.acknowledgements}
        for found in view.acknowledgements:
            if found.signal_id in valid and found.participant not in known:
                self._take_acknowledgement(Acknowledge(found.participant, found.at_ns))

    def _take_acknowledgement(self, event: Acknowledge) -> None:
        before = self._state
        self._state = transition(before, event)
        if len(self._state.acknowledgements) > len(before.acknowledgements):
            self._observer(Acknowledged(self._state, self._state.acknowledgements[-1]))

    def _become_calm(
        self, calm: EmergencyState, by: Clearer, reason: str, origin: str, write: BoardWrite | None
    ) -> EmergencyState:
        before, self._state = self._state, calm
        self._counts["cleared"] += 1
        self._observer(Cleared(before, by, reason, origin, write))
        return before

    def _standing_sources(self) -> tuple[str, ...]:
        standing = self._link.view().standing
        return tuple(signal.origin for signal in standing if signal.level >= self._state.level)

    def _tell_readability(self, view: BoardView) -> None:
        broke, self._unreadable = bool(view.error) and not self._unreadable, bool(view.error)
        if broke:
            self._counts["board_failures"] += 1
            self._observer(BoardUnreadable(view.error))

    def _written(self, write: BoardWrite) -> None:
        self._last_board_latency_ns = write.latency_ns
        self._counts["board_failures"] += bool(write.error)

    def _deadline_ns(self) -> int | None:
        return self._state.deadline_ns if self._state.phase is Phase.RAISED else None
