"""What an emergency is and how it goes: levels, what each asks for, and every transition. Pure: no clock, no board.

Levels only go up by themselves. Going down is one step, to calm, and takes an operator or a rule; it resets everything.
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
    """What a level asks of the service, within `deadline_ms` of its being raised. Logging it always belongs to it.

    `acknowledged_by`: the participants whose acknowledgement is collected. Tolaria's own says that all this is done.
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


class Clearer(Enum):
    """Who wants an emergency cleared."""

    OPERATOR = auto()
    RECOVERED = auto()
    """The rule that what caused it has gone and training has been healthy since."""
    RESTARTED = auto()
    """The rule that the process that fell silent has been replaced by a new one."""


class Phase(Enum):
    """How far the answer to an emergency has got."""

    CALM = auto()
    RAISED = auto()
    ANSWERED = auto()
    """Everyone awaited has acknowledged."""
    OVERDUE = auto()
    """The level's deadline passed first."""


class Move(Enum):
    """What an event comes to, seen from the state that it meets."""

    ESCALATE = auto()
    COVER = auto()
    """Raised at the standing level or below: what is asked for is being done already."""
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
    """That a participant has acted, and how long after the raise."""

    participant: str
    latency_ns: int


@dataclass(frozen=True, slots=True)
class EmergencyState:
    """An emergency at one moment; the default is calm. Times are monotonic nanoseconds, 0 = none.

    `origin` is who raised it; `signal_id` its id on the board, 0 while the board could not be written. `awaited` are
    the participants whose acknowledgement is asked for, `acknowledgements` the first of each, in order of arrival.
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
        """Those awaited who have not acknowledged."""
        answered = {acknowledgement.participant for acknowledgement in self.acknowledgements}
        return tuple(name for name in self.awaited if name not in answered)


CALM = EmergencyState()


@dataclass(frozen=True, slots=True)
class Raise:
    """Somebody raises `level`. `attached` are the participants that live on the board at this moment."""

    level: EmergencyLevel.ValueType
    reason: str
    origin: str
    signal_id: int
    at_ns: int
    attached: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """A participant has acted on the standing emergency."""

    participant: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class PassDeadline:
    """It is `at_ns` now, at or past the deadline."""

    at_ns: int


@dataclass(frozen=True, slots=True)
class Reissue:
    """The signal was put on the board anew, as its origin took it back or its block was lost."""

    signal_id: int


@dataclass(frozen=True, slots=True)
class Clear:
    """The emergency shall be over. `sources` are the origins of every signal of the standing level."""

    by: Clearer
    sources: tuple[str, ...]


Event = Raise | Acknowledge | PassDeadline | Reissue | Clear


def transition(state: EmergencyState, event: Event) -> EmergencyState:
    """The state after `event`.

    Raises:
        UnknownLevelError: when a level is raised that does not exist.
        ClearanceRefusedError: when a rule wants to clear what only an operator may.
        IllegalEmergencyEventError: when the table has no such move, or the deadline has not passed yet.
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
    """What `event` comes to in `state`. Raises as `transition` does, but for what the table decides."""
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
    """Raise `UnknownLevelError` unless an emergency can have this level."""
    if level not in RESPONSES:
        raise UnknownLevelError(f"there is no emergency level {level}")


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
    # Where two raised at once, the other one's signal, acknowledged first, may be the older: no time before zero.
    latency_ns = max(0, event.at_ns - state.raised_ns)
    return replace(state, acknowledgements=(*state.acknowledgements, Acknowledgement(event.participant, latency_ns)))


def _require_clearance(state: EmergencyState, event: Clear) -> None:
    """An operator may clear everything; rules no halt, but that of silence once the silent process is gone."""
    permitted = {
        Clearer.OPERATOR: True,
        Clearer.RECOVERED: state.level < EMERGENCY_LEVEL_HALT,
        Clearer.RESTARTED: set(event.sources) == {SENTINEL},
    }
    if not permitted[event.by]:
        level = EmergencyLevel.Name(state.level)
        raise ClearanceRefusedError(f"{level}, raised by {', '.join(event.sources) or state.origin}, needs an operator")
