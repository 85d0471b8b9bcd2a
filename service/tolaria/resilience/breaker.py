"""Circuit breakers: when to stop calling something that fails, and when to try it again.

Every transition lives in `TRANSITIONS`; `Breaker` is the thin shell that holds one state and a clock. Must not know
what it guards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto

from leyline.v1.enums_pb2 import (
    CIRCUIT_STATE_CLOSED,
    CIRCUIT_STATE_HALF_OPEN,
    CIRCUIT_STATE_OPEN,
    CircuitBreakerState,
)
from tolaria.errors import IllegalTransitionError


class Signal(Enum):
    """What can happen to a breaker."""

    SUCCESS = auto()
    FAILURE = auto()
    FAILURES_SPENT = auto()
    """A failure that uses up what is tolerated in a row."""
    COOLED_DOWN = auto()
    FORCED_OPEN = auto()
    FORCED_CLOSED = auto()


_CLOSED, _OPEN, _HALF_OPEN = CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN

TRANSITIONS: dict[tuple[CircuitBreakerState.ValueType, Signal], CircuitBreakerState.ValueType] = {
    (_CLOSED, Signal.SUCCESS): _CLOSED,
    (_CLOSED, Signal.FAILURE): _CLOSED,
    (_CLOSED, Signal.FAILURES_SPENT): _OPEN,
    (_CLOSED, Signal.FORCED_OPEN): _OPEN,
    (_CLOSED, Signal.FORCED_CLOSED): _CLOSED,
    # A call that began before the breaker opened may still end, either way: too old to count.
    (_OPEN, Signal.SUCCESS): _OPEN,
    (_OPEN, Signal.FAILURE): _OPEN,
    (_OPEN, Signal.FAILURES_SPENT): _OPEN,
    (_OPEN, Signal.COOLED_DOWN): _HALF_OPEN,
    (_OPEN, Signal.FORCED_OPEN): _OPEN,
    (_OPEN, Signal.FORCED_CLOSED): _CLOSED,
    (_HALF_OPEN, Signal.SUCCESS): _CLOSED,
    (_HALF_OPEN, Signal.FAILURE): _OPEN,
    (_HALF_OPEN, Signal.FAILURES_SPENT): _OPEN,
    (_HALF_OPEN, Signal.FORCED_OPEN): _OPEN,
    (_HALF_OPEN, Signal.FORCED_CLOSED): _CLOSED,
}


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """How patient a breaker is: failures in a row until it opens, seconds until it is tried again."""

    failures_max: int = 3
    cooldown_s: float = 30.0


@dataclass(frozen=True, slots=True)
class BreakerStatus:
    """A breaker at one moment. `opened_at_s` is on the clock of whoever passes times in."""

    state: CircuitBreakerState.ValueType = CIRCUIT_STATE_CLOSED
    failures: int = 0
    opened_at_s: float = 0.0


def transition(status: BreakerStatus, signal: Signal, *, now_s: float) -> BreakerStatus:
    """The status after `signal`.

    Raises:
        IllegalTransitionError: when the table has no such move.
    """
    state = TRANSITIONS.get((status.state, signal))
    if state is None:
        name = CircuitBreakerState.Name(status.state)
        raise IllegalTransitionError(f"{signal.name} cannot happen to a breaker in {name}")
    if state == CIRCUIT_STATE_OPEN and status.state != CIRCUIT_STATE_OPEN:
        return BreakerStatus(state, 0, now_s)
    if state == CIRCUIT_STATE_CLOSED and signal is Signal.FAILURE:
        return replace(status, failures=status.failures + 1)
    return replace(status, state=state, failures=0)


class Breaker:
    """Holds one breaker's status. `on_change(name, state)` is told after every change of state."""

    def __init__(
        self,
        name: str,
        *,
        clock: Callable[[], float],
        policy: BreakerPolicy | None = None,
        on_change: Callable[[str, CircuitBreakerState.ValueType], None] = lambda _name, _state: None,
    ) -> None:
        self.name = name
        self._clock = clock
        self._policy = policy or BreakerPolicy()
        self._on_change = on_change
        self._status = BreakerStatus()
        self._trial_running = False

    @property
    def state(self) -> CircuitBreakerState.ValueType:
        """The state now; an open breaker that has cooled down shows as half open."""
        self._cool_down()
        return self._status.state

    def allows(self) -> bool:
        """Whether to call now. Half open lets one trial through and no second until it has ended."""
        state = self.state
        if state == CIRCUIT_STATE_HALF_OPEN:
            allowed, self._trial_running = not self._trial_running, True
            return allowed
        return state == CIRCUIT_STATE_CLOSED

    def succeeded(self) -> None:
        """A call that `allows` let through has succeeded."""
        self._move(Signal.SUCCESS)

    def failed(self) -> None:
        """A call that `allows` let through has failed."""
        spent = self._status.failures + 1 >= self._policy.failures_max
        self._move(Signal.FAILURES_SPENT if spent else Signal.FAILURE)

    def abandoned(self) -> None:
        """A call that `allows` let through was given up by the caller: it says nothing of the other side."""
        self._trial_running = False

    def force(self, state: CircuitBreakerState.ValueType) -> None:
        """Open or close it by order. Raises ValueError for any other state."""
        forced = {CIRCUIT_STATE_OPEN: Signal.FORCED_OPEN, CIRCUIT_STATE_CLOSED: Signal.FORCED_CLOSED}
        if state not in forced:
            raise ValueError(f"a breaker can be forced open or closed, not to {state}")
        self._move(forced[state])

    def _cool_down(self) -> None:
        status = self._status
        if status.state == CIRCUIT_STATE_OPEN and self._clock() - status.opened_at_s >= self._policy.cooldown_s:
            self._move(Signal.COOLED_DOWN)

    def _move(self, signal: Signal) -> None:
        before = self._status.state
        self._status = transition(self._status, signal, now_s=self._clock())
        self._trial_running = False
        if self._status.state != before:
            self._on_change(self.name, self._status.state)
