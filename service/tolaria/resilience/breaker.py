"""Circuit breakers: a transition table, a pure transition function, and a class that holds one breaker's state."""

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


class BreakerEvent(Enum):
    """Inputs of the state machine. FAILURES_SPENT is the failure that reaches the maximum."""

    SUCCESS = auto()
    FAILURE = auto()
    FAILURES_SPENT = auto()
    COOLED_DOWN = auto()
    FORCED_OPEN = auto()
    FORCED_CLOSED = auto()


_CLOSED, _OPEN, _HALF_OPEN = CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN

TRANSITIONS: dict[tuple[CircuitBreakerState.ValueType, BreakerEvent], CircuitBreakerState.ValueType] = {
    (_CLOSED, BreakerEvent.SUCCESS): _CLOSED,
    (_CLOSED, BreakerEvent.FAILURE): _CLOSED,
    (_CLOSED, BreakerEvent.FAILURES_SPENT): _OPEN,
    (_CLOSED, BreakerEvent.FORCED_OPEN): _OPEN,
    (_CLOSED, BreakerEvent.FORCED_CLOSED): _CLOSED,
    # Calls that began before the breaker opened may still end; their outcomes are outdated and do not count.
    (_OPEN, BreakerEvent.SUCCESS): _OPEN,
    (_OPEN, BreakerEvent.FAILURE): _OPEN,
    (_OPEN, BreakerEvent.FAILURES_SPENT): _OPEN,
    (_OPEN, BreakerEvent.COOLED_DOWN): _HALF_OPEN,
    (_OPEN, BreakerEvent.FORCED_OPEN): _OPEN,
    (_OPEN, BreakerEvent.FORCED_CLOSED): _CLOSED,
    (_HALF_OPEN, BreakerEvent.SUCCESS): _CLOSED,
    (_HALF_OPEN, BreakerEvent.FAILURE): _OPEN,
    (_HALF_OPEN, BreakerEvent.FAILURES_SPENT): _OPEN,
    (_HALF_OPEN, BreakerEvent.FORCED_OPEN): _OPEN,
    (_HALF_OPEN, BreakerEvent.FORCED_CLOSED): _CLOSED,
}


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """Consecutive failures that open a breaker, and seconds until it becomes half open."""

    failures_max: int = 3
    cooldown_s: float = 30.0


@dataclass(frozen=True, slots=True)
class BreakerStatus:
    """State, consecutive failures, and the time of opening on the caller's clock."""

    state: CircuitBreakerState.ValueType = CIRCUIT_STATE_CLOSED
    failures: int = 0
    opened_at_s: float = 0.0


def transition(status: BreakerStatus, event: BreakerEvent, *, now_s: float) -> BreakerStatus:
    """Returns the status after `event`.

    Raises:
        IllegalTransitionError: the table has no transition for this state and event.
    """
    state = TRANSITIONS.get((status.state, event))
    if state is None:
        name = CircuitBreakerState.Name(status.state)
        raise IllegalTransitionError(f"{event.name} cannot happen to a breaker in {name}")
    if state == CIRCUIT_STATE_OPEN and status.state != CIRCUIT_STATE_OPEN:
        return BreakerStatus(state, 0, now_s)
    if state == CIRCUIT_STATE_CLOSED and event is BreakerEvent.FAILURE:
        return replace(status, failures=status.failures + 1)
    return replace(status, state=state, failures=0)


class Breaker:
    """One circuit breaker; `on_change` is called with its name and state after each change of state.

    `clock` returns monotonic seconds.
    """

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
        """The current state; an open breaker becomes half open after its cooldown."""
        status = self._status
        if status.state == CIRCUIT_STATE_OPEN and self._clock() - status.opened_at_s >= self._policy.cooldown_s:
            self._apply(BreakerEvent.COOLED_DOWN)
        return self._status.state

    def allows(self) -> bool:
        """Returns whether a call may be made. A half-open breaker allows one trial call at a time."""
        state = self.state
        if state == CIRCUIT_STATE_HALF_OPEN:
            allowed, self._trial_running = not self._trial_running, True
            return allowed
        return state == CIRCUIT_STATE_CLOSED

    def succeeded(self) -> None:
        """Records the success of an allowed call."""
        self._apply(BreakerEvent.SUCCESS)

    def failed(self) -> None:
        """Records the failure of an allowed call."""
        spent = self._status.failures + 1 >= self._policy.failures_max
        self._apply(BreakerEvent.FAILURES_SPENT if spent else BreakerEvent.FAILURE)

    def abandoned(self) -> None:
        """Records that the caller cancelled an allowed call, which says nothing about the peer."""
        self._trial_running = False

    def force(self, state: CircuitBreakerState.ValueType) -> None:
        """Opens or closes the breaker. Raises ValueError for any other state."""
        forced = {CIRCUIT_STATE_OPEN: BreakerEvent.FORCED_OPEN, CIRCUIT_STATE_CLOSED: BreakerEvent.FORCED_CLOSED}
        if state not in forced:
            raise ValueError(f"a breaker can be forced open or closed, not to {state}")
        self._apply(forced[state])

    def _apply(self, event: BreakerEvent) -> None:
        before = self._status.state
        self._status = transition(self._status, event, now_s=self._clock())
        self._trial_running = False
        if self._status.state != before:
            self._on_change(self.name, self._status.state)
