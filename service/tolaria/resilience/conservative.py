"""Conservative mode: on while there is a reason for it. Every reason leaves in a way of its own.

Every transition of a reason lives in `TRANSITIONS`; `ConservativeMode` is the thin shell that holds the standing ones.
Must not know what is skipped while the mode is on, or who tells of reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from leyline.v1.enums_pb2 import CIRCUIT_STATE_HALF_OPEN, CircuitBreakerState
from tolaria.errors import IllegalTransitionError


class Recovery(Enum):
    """What ends a reason. The first two are told by whoever caused it, as the cause itself stands or not."""

    BREAKER_CLOSES = auto()
    EMERGENCY_CLEARED = auto()
    HEALTHY_EPOCHS = auto()
    OPERATOR = auto()


class ReasonEvent(Enum):
    """What can happen to a reason."""

    CAUSED = auto()
    CAUSE_ENDED = auto()
    EPOCHS_SERVED = auto()
    """As many healthy epochs in a row as recovery takes."""
    FORCED_OFF = auto()


@dataclass(frozen=True, slots=True)
class Reason:
    """Why the mode is on. `name` is stable: status, metrics and events show it."""

    name: str
    recovery: Recovery


_BREAKER_PREFIX = "breaker_open:"
OPERATOR = Reason("operator", Recovery.OPERATOR)
EMERGENCY = Reason("emergency", Recovery.EMERGENCY_CLEARED)


def breaker_open(breaker: str) -> Reason:
    """The reason that a breaker is not closed."""
    return Reason(_BREAKER_PREFIX + breaker, Recovery.BREAKER_CLOSES)


def epoch_failed(cause: str) -> Reason:
    """The reason that an epoch failed: boundary_breach, peer_failure, non_finite, loss_explosion."""
    return Reason(f"epoch_failed:{cause}", Recovery.HEALTHY_EPOCHS)


_STANDS, _GONE = True, False
_CAUSED, _ENDED = ReasonEvent.CAUSED, ReasonEvent.CAUSE_ENDED
_SERVED, _FORCED = ReasonEvent.EPOCHS_SERVED, ReasonEvent.FORCED_OFF

TRANSITIONS: Mapping[tuple[Recovery, bool, ReasonEvent], bool] = {
    **{(recovery, stands, _CAUSED): _STANDS for recovery in Recovery for stands in (_STANDS, _GONE)},
    **{(recovery, _GONE, _FORCED): _GONE for recovery in Recovery},
    (Recovery.BREAKER_CLOSES, _STANDS, _ENDED): _GONE,
    (Recovery.EMERGENCY_CLEARED, _STANDS, _ENDED): _GONE,
    (Recovery.OPERATOR, _STANDS, _ENDED): _GONE,
    (Recovery.HEALTHY_EPOCHS, _STANDS, _SERVED): _GONE,
    # Forcing the mode off does not mend a cause that stands: close the breaker, clear the emergency.
    (Recovery.BREAKER_CLOSES, _STANDS, _FORCED): _STANDS,
    (Recovery.EMERGENCY_CLEARED, _STANDS, _FORCED): _STANDS,
    (Recovery.OPERATOR, _STANDS, _FORCED): _GONE,
    (Recovery.HEALTHY_EPOCHS, _STANDS, _FORCED): _GONE,
}


def stands_after(reason: Reason, event: ReasonEvent, *, stood: bool) -> bool:
    """Whether a reason stands after `event`.

    Raises:
        IllegalTransitionError: when the table has no such move.
    """
    stands = TRANSITIONS.get((reason.recovery, stood, event))
    if stands is None:
        state = "a standing" if stood else "an absent"
        raise IllegalTransitionError(f"{event.name} cannot happen to {state} reason {reason.name!r}")
    return stands


@dataclass(frozen=True, slots=True)
class ModeChange:
    """The set of reasons has changed. `reasons` stand now, oldest first; `entered` and `left` are the difference.

    The mode itself was switched when `on` is not `was_on`.
    """

    on: bool
    was_on: bool
    reasons: tuple[str, ...]
    entered: tuple[str, ...]
    left: tuple[str, ...]


class ConservativeMode:
    """Holds the reasons. Used on the event loop only.

    Args:
        recovery_epochs: healthy epochs in a row, at least 1, that end a failed epoch's reason.
        on_change: told after every change of the set of reasons.
    """

    def __init__(self, *, recovery_epochs: int, on_change: Callable[[ModeChange], None]) -> None:
        if recovery_epochs < 1:
            raise ValueError(f"recovery_epochs must be at least 1, got {recovery_epochs}")
        self._recovery_epochs = recovery_epochs
        self._on_change = on_change
        self._standing: dict[Reason, int] = {}
        """Each reason and the healthy epochs in a row since it was caused last."""

    @property
    def on(self) -> bool:
        """Whether any reason stands."""
        return bool(self._standing)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Names of the reasons that stand, oldest first."""
        return tuple(reason.name for reason in self._standing)

    def enter(self, reason: Reason) -> None:
        """A reason is caused, or caused again: then its healthy epochs count from 0 anew."""
        stands_after(reason, ReasonEvent.CAUSED, stood=reason in self._standing)
        self._become({**self._standing, reason: 0})

    def leave(self, reason: Reason) -> None:
        """A reason's cause has ended: its breaker closed, its emergency was cleared, the operator takes it back.

        Raises:
            IllegalTransitionError: when it does not stand, or leaves by healthy epochs only.
        """
        stands_after(reason, ReasonEvent.CAUSE_ENDED, stood=reason in self._standing)
        self._become({other: epochs for other, epochs in self._standing.items() if other != reason})

    def healthy_epoch(self) -> None:
        """An epoch went well: failed epochs' reasons leave after `recovery_epochs` of these in a row."""
        counted = {reason: epochs + 1 for reason, epochs in self._standing.items()}
        self._become({reason: epochs for reason, epochs in counted.items() if self._stays(reason, epochs)})

    def failed_epoch(self) -> None:
        """An epoch failed: the count of healthy ones starts anew for every reason."""
        self._become(dict.fromkeys(self._standing, 0))

    def force_on(self) -> None:
        """An operator wants the mode; it stays until `force_off`."""
        self.enter(OPERATOR)

    def force_off(self) -> None:
        """An operator wants the mode off: every reason leaves but those whose cause stands.

        Those are open breakers (force them closed) and a standing emergency (clear it); `reasons` tells what is left.
        """
        forced = ReasonEvent.FORCED_OFF
        self._become({r: epochs for r, epochs in self._standing.items() if stands_after(r, forced, stood=True)})

    def permits_call(self, peer: str, state: CircuitBreakerState.ValueType) -> bool:
        """Whether a peer may be asked: always while off; while on, only for the trial that its own breaker waits for.

        A breaker that is half open closes by a call that succeeds. Were that call skipped because of the very breaker,
        the mode would never end. An operator's own wish for the mode has no exception.
        """
        trial = state == CIRCUIT_STATE_HALF_OPEN and breaker_open(peer) in self._standing
        return not self.on or (trial and OPERATOR not in self._standing)

    def _stays(self, reason: Reason, healthy_epochs: int) -> bool:
        served = reason.recovery is Recovery.HEALTHY_EPOCHS and healthy_epochs >= self._recovery_epochs
        return not served or stands_after(reason, ReasonEvent.EPOCHS_SERVED, stood=True)

    def _become(self, standing: dict[Reason, int]) -> None:
        before, self._standing = self._standing, standing
        if before.keys() == standing.keys():
            return
        self._on_change(
            ModeChange(
                on=self.on,
                was_on=bool(before),
                reasons=self.reasons,
                entered=tuple(reason.name for reason in standing if reason not in before),
                left=tuple(reason.name for reason in before if reason not in standing),
            )
        )
