"""Emergencies as pure data: levels, required responses, transitions, triggers and clearance rules.

Any participant may raise the level. It falls only to calm, when an operator or a rule clears it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

from leyline.v1 import enums_pb2 as enums
from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.errors import ClearanceRefusedError, IllegalEmergencyEventError, UnknownLevelError
from tolaria.signals import Signal

TOLARIA, SENTINEL = "tolaria", "sentinel"
_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Response:
    """What a level requires of the service within `deadline_ms` of being raised.

    `acknowledged_by`: participants whose acknowledgement is awaited; tolaria's means that the response is done.
    """

    deadline_ms: int
    conservative_mode: bool = False
    halt: bool = False
    acknowledged_by: tuple[str, ...] = (TOLARIA,)


RESPONSES: Mapping[EmergencyLevel.ValueType, Response] = {
    enums.EMERGENCY_LEVEL_NOTICE: Response(5000),
    enums.EMERGENCY_LEVEL_ELEVATED: Response(2000),
    enums.EMERGENCY_LEVEL_CONSERVATIVE: Response(500, conservative_mode=True),
    enums.EMERGENCY_LEVEL_HALT: Response(100, halt=True, acknowledged_by=(TOLARIA, "kasmina", "tamiyo")),
}


CRITICAL_LEVELS = frozenset({enums.EMERGENCY_LEVEL_CONSERVATIVE, enums.EMERGENCY_LEVEL_HALT})
"""Levels whose broadcasts are critical: they bypass every queue, and have a copy in the journal."""

HOW_TO_GO_ON = "clear the emergency (tolaria emergency clear), then resume (tolaria resume)"


class Trigger(Enum):
    """A fault that the service detects itself. The value is the first word of the reason and must not change."""

    BOUNDARY_BREACH = "boundary_breach"
    HOOK_BREACH = "hook_breach"
    PEER_FAILURE = "peer_failure"
    BREAKER_OPEN = "breaker_open"
    ROLLBACK_DEADLINE_MISSED = "rollback_deadline_missed"
    FAILED_EPOCH_STREAK = "failed_epoch_streak"
    ROLLBACK_BUDGET_SPENT = "rollback_budget_spent"
    NO_PROGRESS = "no_progress"
    SKIPPED_DATA_SPENT = "skipped_data_spent"
    PARAMETERS_NOT_FINITE = "parameters_not_finite"
    ACCURACY_COLLAPSE = "accuracy_collapse"
    HEARTBEAT_SILENT = "heartbeat_silent"


TRIGGERS: Mapping[Trigger, EmergencyLevel.ValueType] = {
    Trigger.BOUNDARY_BREACH: enums.EMERGENCY_LEVEL_NOTICE,
    Trigger.HOOK_BREACH: enums.EMERGENCY_LEVEL_NOTICE,
    Trigger.PEER_FAILURE: enums.EMERGENCY_LEVEL_NOTICE,
    Trigger.BREAKER_OPEN: enums.EMERGENCY_LEVEL_ELEVATED,
    Trigger.ACCURACY_COLLAPSE: enums.EMERGENCY_LEVEL_CONSERVATIVE,
    Trigger.ROLLBACK_DEADLINE_MISSED: enums.EMERGENCY_LEVEL_HALT,
    Trigger.FAILED_EPOCH_STREAK: enums.EMERGENCY_LEVEL_HALT,
    Trigger.ROLLBACK_BUDGET_SPENT: enums.EMERGENCY_LEVEL_HALT,
    Trigger.NO_PROGRESS: enums.EMERGENCY_LEVEL_HALT,
    Trigger.SKIPPED_DATA_SPENT: enums.EMERGENCY_LEVEL_HALT,
    Trigger.PARAMETERS_NOT_FINITE: enums.EMERGENCY_LEVEL_HALT,
    Trigger.HEARTBEAT_SILENT: enums.EMERGENCY_LEVEL_HALT,
}


class Clearer(Enum):
    """The authority that clears an emergency."""

    OPERATOR = auto()
    RECOVERED = auto()
    """Rule: no cause remains and enough epochs were healthy."""
    RESTARTED = auto()
    """Rule: a new process replaced the one whose heartbeat was silent."""


class Phase(Enum):
    """Progress of the response to an emergency: CALM -> RAISED -> ANSWERED | OVERDUE (-> ANSWERED) -> CALM.

    A higher level starts again at RAISED.
    """

    CALM = auto()
    RAISED = auto()
    ANSWERED = auto()
    """All awaited participants acknowledged."""
    OVERDUE = auto()
    """The level's deadline passed first."""


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
    level: EmergencyLevel.ValueType = enums.EMERGENCY_LEVEL_UNSPECIFIED
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


def raised(state: EmergencyState, signal: Signal, attached: tuple[str, ...]) -> EmergencyState:
    """Returns the emergency that `signal` raises; `state` itself unless the signal's level is higher.

    `attached`: participants whose heartbeat on the board is fresh. Raises `UnknownLevelError`.
    """
    require_level(signal.level)
    if signal.level <= state.level:
        return state
    response = RESPONSES[signal.level]
    return EmergencyState(
        phase=Phase.RAISED,
        level=signal.level,
        reason=signal.reason,
        origin=signal.origin,
        signal_id=signal.signal_id,
        raised_ns=signal.raised_ns,
        deadline_ns=signal.raised_ns + response.deadline_ms * _MS,
        awaited=tuple(name for name in response.acknowledged_by if name == TOLARIA or name in attached),
    )


def acknowledged(state: EmergencyState, participant: str, at_ns: int) -> EmergencyState:
    """Returns the state after `participant` acted on the emergency; only its first acknowledgement counts.

    Raises `IllegalEmergencyEventError` when there is no emergency.
    """
    _require_emergency(state)
    if participant in {acknowledgement.participant for acknowledgement in state.acknowledgements}:
        return state
    # When two participants raise at once, the signal acknowledged first may be older than this state's: never below 0.
    acknowledgement = Acknowledgement(participant, max(0, at_ns - state.raised_ns))
    after = replace(state, acknowledgements=(*state.acknowledgements, acknowledgement))
    return after if after.missing else replace(after, phase=Phase.ANSWERED)


def overdue(state: EmergencyState, at_ns: int) -> EmergencyState:
    """Returns the state after its deadline passed unanswered.

    Raises `IllegalEmergencyEventError` in any phase but RAISED, and when the deadline is later than `at_ns`.
    """
    if state.phase is not Phase.RAISED:
        raise IllegalEmergencyEventError(f"an emergency that is {state.phase.name} misses no deadline")
    if at_ns < state.deadline_ns:
        raise IllegalEmergencyEventError(f"the deadline is {state.deadline_ns - at_ns} ns away")
    return replace(state, phase=Phase.OVERDUE)


def cleared(state: EmergencyState, by: Clearer, sources: tuple[str, ...]) -> EmergencyState:
    """Returns the state after a clearance. `sources`: origins of all active signals of the emergency's level.

    Raises `ClearanceRefusedError` unless `by` may clear it: an operator may clear everything, a rule no halt except
    the sentinel's once the silent process was replaced. Raises `IllegalEmergencyEventError` when there is none.
    """
    permitted = {
        Clearer.OPERATOR: True,
        Clearer.RECOVERED: state.level < enums.EMERGENCY_LEVEL_HALT,
        Clearer.RESTARTED: set(sources) == {SENTINEL},
    }
    if not permitted[by]:
        origins = ", ".join(sources) or state.origin
        raise ClearanceRefusedError(f"{level_name(state.level)}, raised by {origins}, needs an operator")
    _require_emergency(state)
    return CALM


def require_level(level: int) -> None:
    """Raises `UnknownLevelError` unless `level` is a level of emergencies."""
    if level not in RESPONSES:
        raise UnknownLevelError(f"there is no emergency level {level}")


def _require_emergency(state: EmergencyState) -> None:
    if state.phase is Phase.CALM:
        raise IllegalEmergencyEventError("there is no emergency")


@dataclass(frozen=True, slots=True)
class EpochStreak:
    """The number of epochs in a row that `failed` or were `healthy`; one of them is 0.

    `failed_max`: failed epochs in a row that raise `FAILED_EPOCH_STREAK`.
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
    """Returns whether the rule `Clearer.RECOVERED` applies: below HALT, enough healthy epochs, and no cause left."""
    below_halt = state.phase is not Phase.CALM and state.level < enums.EMERGENCY_LEVEL_HALT
    return below_halt and not cause_remains and streak.healthy >= recovery_epochs


def level_name(level: EmergencyLevel.ValueType) -> str:
    """Returns the level in lower case without its prefix; its number where the contract has no name for it."""
    name = EmergencyLevel.Name(level) if level in EmergencyLevel.values() else str(level)
    return name.removeprefix("EMERGENCY_LEVEL_").lower()
