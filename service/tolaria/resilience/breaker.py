"""Circuit breakers: a transition table, a pure transition function, and a class that holds one breaker's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TypeAlias

from leyline.v1 import enums_pb2 as enums
from tolaria.errors import IllegalTransitionError

_CLOSED, _OPEN, _HALF_OPEN = enums.CIRCUIT_STATE_CLOSED, enums.CIRCUIT_STATE_OPEN, enums.CIRCUIT_STATE_HALF_OPEN
State: TypeAlias = "enums.CircuitBreakerState.ValueType"


class BreakerEvent(Enum):
    """Inputs of the state machine. FAILURES_SPENT is the failure that reaches the maximum."""

    SUCCESS = auto()
    FAILURE = auto()
    FAILURES_SPENT = auto()
    COOLED_DOWN = auto()
    FORCED_OPEN = auto()
    FORCED_CLOSED = auto()


TRANSITIONS: Mapping[tuple[State, BreakerEvent], State] = {
    (_CLOSED, BreakerEvent.SUCCESS): _CLOSED,
    (_CLOSED, BreakerEvent.FAILURE): _CLOSED,
    (_CLOSED, BreakerEvent.FAILURES_SPENT): _OPEN,
    # Calls that began before the breaker opened may still end; their outcome is too old to count.
    (_OPEN, BreakerEvent.SUCCESS): _OPEN,
    (_OPEN, BreakerEvent.FAILURE): _OPEN,
    (_OPEN, BreakerEvent.FAILURES_SPENT): _OPEN,
    (_OPEN, BreakerEvent.COOLED_DOWN): _HALF_OPEN,
    (_HALF_OPEN, BreakerEvent.SUCCESS): _CLOSED,
    (_HALF_OPEN, BreakerEvent.FAILURE): _OPEN,
    (_HALF_OPEN, BreakerEvent.FAILURES_SPENT): _OPEN,
    **{(state, BreakerEvent.FORCED_OPEN): _OPEN for state in (_CLOSED, _OPEN, _HALF_OPEN)},
    **{(state, BreakerEvent.FORCED_CLOSED): _CLOSED for state in (_CLOSED, _OPEN, _HALF_OPEN)},
}


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """Consecutive failures that open a breaker, and seconds until it becomes half open."""

    failures_max: int = 3
    cooldown_s: float = 30.0


@dataclass(frozen=True, slots=True)
class BreakerStatus:
    """State, consecutive failures, and the time of opening on the caller's clock."""

    state: State = _CLOSED
    failures: int = 0
    opened_at_s: float = 0.0


def transition(status: BreakerStatus, event: BreakerEvent, *, now_s: float) -> BreakerStatus:
    """Returns the status after `event`. Raises `IllegalTransitionError` when `TRANSITIONS` has none for it."""
    state = TRANSITIONS.get((status.state, event))
    if state is None:
        name = enums.CircuitBreakerState.Name(status.state)
        raise IllegalTransitionError(f"{event.name} cannot happen to a breaker in {name}")
    if state == _OPEN and status.state != _OPEN:
        return BreakerStatus(state, 0, now_s)
    if state == _CLOSED and event is BreakerEvent.FAILURE:
        return replace(status, failures=status.failures + 1)
    return replace(status, state=state, failures=0)


class Breaker:
    """One circuit breaker. Calls `on_change(name, state)` after each change of state; `clock` is monotonic seconds."""

    def __init__(
        self,
        name: str,
        *,
        clock: Callable[[], float],
        policy: BreakerPolicy | None = None,
        on_change: Callable[[str, State], None] = lambda _name, _state: None,
    ) -> None:
        self.name = name
        self._clock = clock
        self._policy = policy or BreakerPolicy()
        self._on_change = on_change
        self._status = BreakerStatus()
        self._trial_running = False

    @property
    def state(self) -> State:
        """The current state; an open breaker becomes half open after its cooldown."""
        status = self._status
        if status.state == _OPEN and self._clock() - status.opened_at_s >= self._policy.cooldown_s:
            self._apply(BreakerEvent.COOLED_DOWN)
        return self._status.state

    def allows(self) -> bool:
        """Returns whether a call may be made. A half-open breaker allows one trial call at a time."""
        state = self.state
        if state == _HALF_OPEN:
            allowed, self._trial_running = not self._trial_running, True
            return allowed
        return state == _CLOSED

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

    def force(self, state: State) -> None:
        """Opens or closes the breaker. Raises ValueError for any other state."""
        forced = {_OPEN: BreakerEvent.FORCED_OPEN, _CLOSED: BreakerEvent.FORCED_CLOSED}
        if state not in forced:
            raise ValueError(f"a breaker can be forced open or closed, not to {state}")
        self._apply(forced[state])

    def _apply(self, event: BreakerEvent) -> None:
        before = self._status.state
        self._status = transition(self._status, event, now_s=self._clock())
        self._trial_running = False
        if self._status.state != before:
            self._on_change(self.name, self._status.state)
