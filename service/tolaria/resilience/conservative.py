"""Conservative mode, which is on while a reason for it is active. Each kind of reason ends in a different way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from leyline.v1.enums_pb2 import CIRCUIT_STATE_HALF_OPEN, CircuitBreakerState
from tolaria.errors import IllegalTransitionError


class EndCondition(Enum):
    """What ends a reason."""

    BREAKER_CLOSES = auto()
    EMERGENCY_CLEARED = auto()
    HEALTHY_EPOCHS = auto()
    OPERATOR = auto()


class ReasonEvent(Enum):
    """Inputs of a reason's state machine. EPOCHS_SERVED is the last of the healthy epochs that recovery takes."""

    CAUSED = auto()
    CAUSE_ENDED = auto()
    EPOCHS_SERVED = auto()
    FORCED_OFF = auto()


@dataclass(frozen=True, slots=True)
class Reason:
    """A reason for the mode. `name` is stable, as it appears in status, metrics and events."""

    name: str
    ended_by: EndCondition


OPERATOR = Reason("operator", EndCondition.OPERATOR)
EMERGENCY = Reason("emergency", EndCondition.EMERGENCY_CLEARED)


def breaker_open(breaker: str) -> Reason:
    """Returns the reason that a circuit breaker is not closed."""
    return Reason(f"breaker_open:{breaker}", EndCondition.BREAKER_CLOSES)


def epoch_failed(cause: str) -> Reason:
    """Returns the reason that an epoch failed by boundary_breach, peer_failure, non_finite or loss_explosion."""
    return Reason(f"epoch_failed:{cause}", EndCondition.HEALTHY_EPOCHS)


_ACTIVE, _INACTIVE = True, False
_CAUSED, _ENDED = ReasonEvent.CAUSED, ReasonEvent.CAUSE_ENDED
_SERVED, _FORCED = ReasonEvent.EPOCHS_SERVED, ReasonEvent.FORCED_OFF

TRANSITIONS: Mapping[tuple[EndCondition, bool, ReasonEvent], bool] = {
    **{(condition, active, _CAUSED): _ACTIVE for condition in EndCondition for active in (_ACTIVE, _INACTIVE)},
    **{(condition, _INACTIVE, _FORCED): _INACTIVE for condition in EndCondition},
    (EndCondition.BREAKER_CLOSES, _ACTIVE, _ENDED): _INACTIVE,
    (EndCondition.EMERGENCY_CLEARED, _ACTIVE, _ENDED): _INACTIVE,
    (EndCondition.OPERATOR, _ACTIVE, _ENDED): _INACTIVE,
    (EndCondition.HEALTHY_EPOCHS, _ACTIVE, _SERVED): _INACTIVE,
    # Forcing the mode off does not end a cause that persists: the breaker or the emergency has to be reset.
    (EndCondition.BREAKER_CLOSES, _ACTIVE, _FORCED): _ACTIVE,
    (EndCondition.EMERGENCY_CLEARED, _ACTIVE, _FORCED): _ACTIVE,
    (EndCondition.OPERATOR, _ACTIVE, _FORCED): _INACTIVE,
    (EndCondition.HEALTHY_EPOCHS, _ACTIVE, _FORCED): _INACTIVE,
}


def active_after(reason: Reason, event: ReasonEvent, *, active: bool) -> bool:
    """Returns whether a reason is active after `event`.

    Raises:
        IllegalTransitionError: the table has no transition for this event.
    """
    after = TRANSITIONS.get((reason.ended_by, active, event))
    if after is None:
        state = "active" if active else "inactive"
        raise IllegalTransitionError(f"{event.name} cannot happen to reason {reason.name!r}, which is {state}")
    return after


@dataclass(frozen=True, slots=True)
class ModeChange:
    """A change of the set of reasons: `reasons` are the active ones, oldest first; `entered` and `left` differ."""

    on: bool
    was_on: bool
    reasons: tuple[str, ...]
    entered: tuple[str, ...]
    left: tuple[str, ...]


class ConservativeMode:
    """The active reasons; `on_change` is called after each change of their set.

    `recovery_epochs` consecutive healthy epochs, at least 1, end the reason of a failed epoch.
    """

    def __init__(self, *, recovery_epochs: int, on_change: Callable[[ModeChange], None]) -> None:
        self._recovery_epochs = recovery_epochs
        self._on_change = on_change
        self._active: dict[Reason, int] = {}
        """The active reasons, each with the consecutive healthy epochs since it was caused last."""

    @property
    def on(self) -> bool:
        """Whether any reason is active."""
        return bool(self._active)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Names of the active reasons, oldest first."""
        return tuple(reason.name for reason in self._active)

    def enter(self, reason: Reason) -> None:
        """Activates a reason; if it is active already, its healthy epochs count from 0 again."""
        self._replace({**self._active, reason: 0})

    def leave(self, reason: Reason) -> None:
        """Ends a reason whose cause has ended.

        Raises:
            IllegalTransitionError: the reason is not active, or ends by healthy epochs only.
        """
        active_after(reason, ReasonEvent.CAUSE_ENDED, active=reason in self._active)
        self._replace({other: epochs for other, epochs in self._active.items() if other != reason})

    def healthy_epoch(self) -> None:
        """Counts a healthy epoch; reasons of failed epochs end after `recovery_epochs` consecutive ones."""
        counted = {reason: epochs + 1 for reason, epochs in self._active.items()}
        self._replace({reason: epochs for reason, epochs in counted.items() if self._remains(reason, epochs)})

    def failed_epoch(self) -> None:
        """Resets the count of healthy epochs of every reason."""
        self._replace(dict.fromkeys(self._active, 0))

    def force_on(self) -> None:
        """Turns the mode on by request of an operator, until `force_off`."""
        self.enter(OPERATOR)

    def force_off(self) -> None:
        """Ends every reason whose cause does not persist; open breakers and emergencies remain in `reasons`."""
        self._replace({r: epochs for r, epochs in self._active.items() if active_after(r, _FORCED, active=True)})

    def permits_call(self, peer: str, state: CircuitBreakerState.ValueType) -> bool:
        """Returns whether a peer may be called: while the mode is on, only for the trial of its half-open breaker.

        The breaker closes by a successful call, so skipping the trial would keep the mode on forever. If an operator
        turned the mode on, there is no trial either.
        """
        trial = state == CIRCUIT_STATE_HALF_OPEN and breaker_open(peer) in self._active
        return not self.on or (trial and OPERATOR not in self._active)

    def _remains(self, reason: Reason, healthy_epochs: int) -> bool:
        served = reason.ended_by is EndCondition.HEALTHY_EPOCHS and healthy_epochs >= self._recovery_epochs
        return not served or active_after(reason, ReasonEvent.EPOCHS_SERVED, active=True)

    def _replace(self, active: dict[Reason, int]) -> None:
        before, self._active = self._active, active
        if before.keys() == active.keys():
            return
        self._on_change(
            ModeChange(
                on=self.on,
                was_on=bool(before),
                reasons=self.reasons,
                entered=tuple(reason.name for reason in active if reason not in before),
                left=tuple(reason.name for reason in before if reason not in active),
            )
        )
