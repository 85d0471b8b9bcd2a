"""Emergencies as pure data: levels, required responses, transitions, triggers and clearance rules.

Levels rise by themselves. They fall in one step, to calm, which takes an operator or a clearance rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import assert_never

from leyline.v1.enums_pb2 import (
    EMERGENCY_LEVEL_CONSERVATIVE,
    EMERGENCY_LEVEL_ELEVATED,
    EMERGENCY_LEVEL_HALT,
    EMERGENCY_LEVEL_NOTICE,
    EMERGENCY_LEVEL_UNSPECIFIED,
    EmergencyLevel,
)
from tolaria.errors import ClearanceRefusedError, IllegalEmergencyEventError, UnknownLevelError

TOLARIA, SENTINEL = "tolaria", "sentinel"
_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Response:
    """What a level requires of the service within `deadline_ms` of its raise; logging is always required.

    `acknowledged_by`: participants whose acknowledgement is collected; tolaria's own means that the response is done.
    """

    deadline_ms: int
    full_rollback_may_be_asked: bool = False
    conservative_mode: bool = False
    fast_rollback: bool = False
    halt: bool = False
    acknowledged_by: tuple[str, ...] = (TOLARIA,)


RESPONSES: Mapping[EmergencyLevel.ValueType, Response] = {
    EMERGENCY_LEVEL_NOTICE: Response(5000),
    EMERGENCY_LEVEL_ELEVATED: Response(2000, full_rollback_may_be_asked=True),
    EMERGENCY_LEVEL_CONSERVATIVE: Response(500, conservative_mode=True, fast_rollback=True),
    EMERGENCY_LEVEL_HALT: Response(100, halt=True, acknowledged_by=(TOLARIA, "kasmina", "tamiyo")),
}


class Trigger(Enum):
    """A fault that the service detects itself. The value is the stable beginning of the reason."""

    BOUNDARY_BREACH = "boundary_breach"
    HOOK_BREACH = "hook_breach"
    BREAKER_OPEN = "breaker_open"
    ROLLBACK_DEADLINE_MISSED = "rollback_deadline_missed"
    FAILED_EPOCH_STREAK = "failed_epoch_streak"
    ROLLBACK_BUDGET_SPENT = "rollback_budget_spent"
    HEARTBEAT_SILENT = "heartbeat_silent"


TRIGGERS: Mapping[Trigger, EmergencyLevel.ValueType] = {
    Trigger.BOUNDARY_BREACH: EMERGENCY_LEVEL_ELEVATED,
    Trigger.HOOK_BREACH: EMERGENCY_LEVEL_ELEVATED,
    Trigger.BREAKER_OPEN: EMERGENCY_LEVEL_CONSERVATIVE,
    Trigger.ROLLBACK_DEADLINE_MISSED: EMERGENCY_LEVEL_HALT,
    Trigger.FAILED_EPOCH_STREAK: EMERGENCY_LEVEL_HALT,
    Trigger.ROLLBACK_BUDGET_SPENT: EMERGENCY_LEVEL_HALT,
    Trigger.HEARTBEAT_SILENT: EMERGENCY_LEVEL_HALT,
}


class Clearer(Enum):
    """On whose authority an emergency is cleared."""

    OPERATOR = auto()
    RECOVERED = auto()
    """Rule: the cause is gone and training has been healthy since."""
    RESTARTED = auto()
    """Rule: a new process replaced the one whose heartbeat was silent."""


class Phase(Enum):
    """Progress of the response to an emergency."""

    CALM = auto()
    RAISED = auto()
    ANSWERED = auto()
    """All awaited participants acknowledged."""
    OVERDUE = auto()
    """The level's deadline passed first."""


class Move(Enum):
    """The kind of transition that an event causes in a given state."""

    ESCALATE = auto()
    COVER = auto()
    """A raise at the active level or below, which requires nothing further."""
    ACKNOWLEDGE = auto()
    ACKNOWLEDGE_LAST = auto()
    MISS_DEADLINE = auto()
    REISSUE = auto()
    CLEAR = auto()


TRANSITIONS: Mapping[tuple[Phase, Move], Phase] = {
    (Phase.CALM, Move.ESCALATE): Phase.RAISED,
    (Phase.RAISED, Move.ESCALATE): Phase.RAISED,
    (Phase.RAISED, Move.COVER): Phase.RAISED,
    (Phase.RAISED, Move.ACKNOWLEDGE): Phase.RAISED,
    (Phase.RAISED, Move.ACKNOWLEDGE_LAST): Phase.ANSWERED,
    (Phase.RAISED, Move.MISS_DEADLINE): Phase.OVERDUE,
    (Phase.RAISED, Move.REISSUE): Phase.RAISED,
    (Phase.RAISED, Move.CLEAR): Phase.CALM,
    (Phase.ANSWERED, Move.ESCALATE): Phase.RAISED,
    (Phase.ANSWERED, Move.COVER): Phase.ANSWERED,
    (Phase.ANSWERED, Move.ACKNOWLEDGE): Phase.ANSWERED,
    (Phase.ANSWERED, Move.REISSUE): Phase.ANSWERED,
    (Phase.ANSWERED, Move.CLEAR): Phase.CALM,
    (Phase.OVERDUE, Move.ESCALATE): Phase.RAISED,
    (Phase.OVERDUE, Move.COVER): Phase.OVERDUE,
    (Phase.OVERDUE, Move.ACKNOWLEDGE): Phase.OVERDUE,
    (Phase.OVERDUE, Move.ACKNOWLEDGE_LAST): Phase.ANSWERED,
    (Phase.OVERDUE, Move.REISSUE): Phase.OVERDUE,
    (Phase.OVERDUE, Move.CLEAR): Phase.CALM,
}


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """A participant's acknowledgement and its time after the raise."""

    participant: str
    latency_ns: int


@dataclass(frozen=True, slots=True)
class EmergencyState:
    """An emergency at one moment; the default is calm. Times are monotonic nanoseconds, 0 is none.

    `origin` raised it; `signal_id` is its id on the board, 0 when the board could not be written. `awaited` are the
    participants that must acknowledge, `acknowledgements` the first of each participant, in order of arrival.
    """

    phase: Phase = Phase.CALM
    level: EmergencyLevel.ValueType = EMERGENCY_LEVEL_UNSPECIFIED
    reason: str = ""
    origin: str = ""
    signal_id: int = 0
    raised_ns: int = 0
    deadline_ns: int = 0
    awaited: tuple[str, ...] = ()
    acknowledgements: tuple[Acknowledgement, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Awaited participants that have not acknowledged."""
        answered = {acknowledgement.participant for acknowledgement in self.acknowledgements}
        return tuple(name for name in self.awaited if name not in answered)


CALM = EmergencyState()


@dataclass(frozen=True, slots=True)
class Raise:
    """`origin` raises `level`. `attached`: participants whose heartbeat on the board is fresh."""

    level: EmergencyLevel.ValueType
    reason: str
    origin: str
    signal_id: int
    at_ns: int
    attached: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """A participant acted on the active emergency."""

    participant: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class PassDeadline:
    """The time is `at_ns`, at or past the deadline."""

    at_ns: int


@dataclass(frozen=True, slots=True)
class Reissue:
    """The signal was written to the board again, as its origin cleared it or lost its block."""

    signal_id: int


@dataclass(frozen=True, slots=True)
class Clear:
    """Ends the emergency. `sources` are the origins of all active signals of its level."""

    by: Clearer
    sources: tuple[str, ...]


Event = Raise | Acknowledge | PassDeadline | Reissue | Clear


def transition(state: EmergencyState, event: Event) -> EmergencyState:
    """Returns the state after `event`.

    Raises:
        UnknownLevelError: the raised level does not exist.
        ClearanceRefusedError: a rule may not clear this emergency.
        IllegalEmergencyEventError: the table has no such move, or the deadline is in the future.
    """
    move = move_of(state, event)
    phase = TRANSITIONS.get((state.phase, move))
    if phase is None:
        raise IllegalEmergencyEventError(f"{move.name} cannot happen to an emergency that is {state.phase.name}")
    match event:
        case Raise():
            return state if move is Move.COVER else _raised(phase, event)
        case Acknowledge():
            return replace(_with_acknowledgement(state, event), phase=phase)
        case PassDeadline():
            return replace(state, phase=phase)
        case Reissue():
            return replace(state, phase=phase, signal_id=event.signal_id)
        case Clear():
            return CALM
        case _:
            assert_never(event)


def move_of(state: EmergencyState, event: Event) -> Move:
    """Returns the move that `event` makes in `state`. Raises as `transition` does, table aside."""
    match event:
        case Raise():
            require_level(event.level)
            return Move.ESCALATE if event.level > state.level else Move.COVER
        case Acknowledge():
            return Move.ACKNOWLEDGE_LAST if state.missing == (event.participant,) else Move.ACKNOWLEDGE
        case PassDeadline():
            if event.at_ns < state.deadline_ns:
                raise IllegalEmergencyEventError(f"the deadline is {state.deadline_ns - event.at_ns} ns away")
            return Move.MISS_DEADLINE
        case Reissue():
            return Move.REISSUE
        case Clear():
            _require_clearance(state, event)
            return Move.CLEAR
        case _:
            assert_never(event)


def require_level(level: int) -> None:
    """Raises `UnknownLevelError` unless `level` is a level of emergencies."""
    if level not in RESPONSES:
        raise UnknownLevelError(f"there is no emergency level {level}")


@dataclass(frozen=True, slots=True)
class EpochStreak:
    """The latest run of epochs with the same outcome: `failed` or `healthy` ones, of which one is 0.

    `failed_max`: failed epochs in a row that are a `FAILED_EPOCH_STREAK`.
    """

    failed_max: int
    failed: int = 0
    healthy: int = 0

    @property
    def spent(self) -> bool:
        """Whether the last epoch completed a streak of failures; true again after `failed_max` more."""
        return self.failed > 0 and self.failed % self.failed_max == 0

    def after(self, *, healthy: bool) -> EpochStreak:
        """Returns the streak after one more epoch."""
        if healthy:
            return replace(self, failed=0, healthy=self.healthy + 1)
        return replace(self, failed=self.failed + 1, healthy=0)


def recovered(state: EmergencyState, streak: EpochStreak, *, recovery_epochs: int, cause_remains: bool) -> bool:
    """Returns whether the rule `Clearer.RECOVERED` applies: below HALT, enough healthy epochs, and no cause left.

    `cause_remains`: a breaker is not closed, for instance.
    """
    below_halt = state.phase is not Phase.CALM and state.level < EMERGENCY_LEVEL_HALT
    return below_halt and not cause_remains and streak.healthy >= recovery_epochs


def _raised(phase: Phase, event: Raise) -> EmergencyState:
    response = RESPONSES[event.level]
    return EmergencyState(
        phase=phase,
        level=event.level,
        reason=event.reason,
        origin=event.origin,
        signal_id=event.signal_id,
        raised_ns=event.at_ns,
        deadline_ns=event.at_ns + response.deadline_ms * _MS,
        awaited=tuple(name for name in response.acknowledged_by if name == TOLARIA or name in event.attached),
    )


def _with_acknowledgement(state: EmergencyState, event: Acknowledge) -> EmergencyState:
    if event.participant in {acknowledgement.participant for acknowledgement in state.acknowledgements}:
        return state
    # When two participants raise at once, the signal acknowledged first may be older than this state's: never below 0.
    latency_ns = max(0, event.at_ns - state.raised_ns)
    return replace(state, acknowledgements=(*state.acknowledgements, Acknowledgement(event.participant, latency_ns)))


def _require_clearance(state: EmergencyState, event: Clear) -> None:
    """An operator may clear everything; rules no halt, except the sentinel's once the silent process is replaced."""
    permitted = {
        Clearer.OPERATOR: True,
        Clearer.RECOVERED: state.level < EMERGENCY_LEVEL_HALT,
        Clearer.RESTARTED: set(event.sources) == {SENTINEL},
    }
    if not permitted[event.by]:
        level = EmergencyLevel.Name(state.level)
        raise ClearanceRefusedError(f"{level}, raised by {', '.join(event.sources) or state.origin}, needs an operator")
