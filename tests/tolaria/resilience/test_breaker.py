from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import (
    CIRCUIT_STATE_CLOSED,
    CIRCUIT_STATE_HALF_OPEN,
    CIRCUIT_STATE_OPEN,
    CIRCUIT_STATE_UNKNOWN,
    CircuitBreakerState,
)
from tolaria.errors import IllegalTransitionError
from tolaria.resilience.breaker import Breaker, BreakerEvent, BreakerStatus, transition

CLOSED, OPEN, HALF_OPEN = CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN
STATES = (CLOSED, OPEN, HALF_OPEN)

# The state after each event (columns: from closed, open, half open); None: illegal.
AFTER: dict[BreakerEvent, tuple[CircuitBreakerState.ValueType | None, ...]] = {
    BreakerEvent.SUCCESS: (CLOSED, OPEN, CLOSED),
    BreakerEvent.FAILURE: (CLOSED, OPEN, OPEN),
    BreakerEvent.FAILURES_SPENT: (OPEN, OPEN, OPEN),
    BreakerEvent.COOLED_DOWN: (None, HALF_OPEN, None),
    BreakerEvent.FORCED_OPEN: (OPEN, OPEN, OPEN),
    BreakerEvent.FORCED_CLOSED: (CLOSED, CLOSED, CLOSED),
}


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(("state", "event"), list(itertools.product(STATES, BreakerEvent)))
def test_transition_of_each_state_and_event(state: CircuitBreakerState.ValueType, event: BreakerEvent) -> None:
    """A transition that is not listed raises and leaves the status unchanged."""
    before = BreakerStatus(state, failures=1, opened_at_s=5.0)
    after = AFTER[event][STATES.index(state)]
    if after is None:
        with pytest.raises(IllegalTransitionError):
            transition(before, event, now_s=9.0)
        assert before == BreakerStatus(state, failures=1, opened_at_s=5.0)
    else:
        assert transition(before, event, now_s=9.0).state == after


def test_breaker_opens_at_the_third_failure_and_closes_after_a_successful_trial() -> None:
    """Three consecutive failures open it; after 30 s one trial call is allowed, and its success closes it."""
    clock = Clock()
    changes: list[int] = []
    breaker = Breaker("x", clock=clock, on_change=lambda _name, state: changes.append(state))
    for _ in range(3):
        assert breaker.allows()
        breaker.failed()
    assert not breaker.allows()
    clock.now_s += 29.9
    assert not breaker.allows()
    clock.now_s += 0.2
    assert breaker.allows()
    assert not breaker.allows()  # the trial has not ended
    breaker.succeeded()
    assert breaker.allows()
    assert changes == [CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN, CIRCUIT_STATE_CLOSED]


def test_success_resets_the_failure_count() -> None:
    """Only consecutive failures open a breaker."""
    breaker = Breaker("x", clock=Clock())
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.state == CIRCUIT_STATE_CLOSED


def test_abandoned_trial_allows_another_one() -> None:
    """A cancelled trial neither closes nor opens a half-open breaker."""
    clock = Clock()
    breaker = Breaker("x", clock=clock)
    breaker.force(CIRCUIT_STATE_OPEN)
    clock.now_s += 31
    assert breaker.allows()
    breaker.abandoned()
    assert breaker.allows()


def test_failed_trial_restarts_the_cooldown() -> None:
    """A breaker whose trial fails is open for the full cooldown again."""
    clock = Clock()
    breaker = Breaker("x", clock=clock)
    breaker.force(CIRCUIT_STATE_OPEN)
    clock.now_s += 31
    assert breaker.allows()
    breaker.failed()
    clock.now_s += 29
    assert not breaker.allows()


@pytest.mark.parametrize("state", [CIRCUIT_STATE_UNKNOWN, CIRCUIT_STATE_HALF_OPEN])
def test_breaker_can_be_forced_open_or_closed_only(state: CircuitBreakerState.ValueType) -> None:
    """Half open is reached by the cooldown only."""
    with pytest.raises(ValueError, match="forced open or closed"):
        Breaker("x", clock=Clock()).force(state)


@given(st.lists(st.sampled_from(["ok", "fail", "wait", "abandon", "force_open", "force_closed"]), max_size=60))
def test_three_consecutive_failures_open_it_after_any_sequence(steps: list[str]) -> None:
    """A breaker that does not allow calls is not closed, and no sequence of calls raises."""
    clock = Clock()
    breaker = Breaker("x", clock=clock)
    failures = 0
    for step in steps:
        if step == "wait":
            clock.now_s += 31
            continue
        if step.startswith("force"):
            breaker.force(CIRCUIT_STATE_OPEN if step == "force_open" else CIRCUIT_STATE_CLOSED)
            failures = 0
            continue
        if not breaker.allows():
            assert breaker.state != CIRCUIT_STATE_CLOSED
            continue
        was_closed = breaker.state == CIRCUIT_STATE_CLOSED
        {"ok": breaker.succeeded, "fail": breaker.failed, "abandon": breaker.abandoned}[step]()
        failures = failures + 1 if step == "fail" else 0 if step == "ok" else failures
        if step == "fail" and (failures >= 3 or not was_closed):
            assert breaker.state == CIRCUIT_STATE_OPEN
            failures = 0


# The state of a Breaker after each action (columns: from closed, open, half open).
AFTER_ACTION = {
    "succeeded": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_CLOSED),
    "failed": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_OPEN),
    "failed three times": (CIRCUIT_STATE_OPEN, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_OPEN),
    "abandoned": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN),
    "waited 29 s": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN),
    "waited 31 s": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_HALF_OPEN, CIRCUIT_STATE_HALF_OPEN),
    "forced open": (CIRCUIT_STATE_OPEN, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_OPEN),
    "forced closed": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_CLOSED),
    "forced half open": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN),
    "forced to unknown": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN),
}


def act(breaker: Breaker, clock: Clock, action: str) -> None:
    """Performs an action; forcing an invalid state raises."""
    match action.split():
        case ["failed", "three", "times"]:
            for _ in range(3):
                breaker.failed()
        case ["waited", seconds, "s"]:
            clock.now_s += float(seconds)
        case ["forced", "open"]:
            breaker.force(CIRCUIT_STATE_OPEN)
        case ["forced", "closed"]:
            breaker.force(CIRCUIT_STATE_CLOSED)
        case ["forced", *_]:
            with pytest.raises(ValueError, match="forced open or closed"):
                breaker.force(CIRCUIT_STATE_UNKNOWN if action.endswith("unknown") else CIRCUIT_STATE_HALF_OPEN)
        case _:
            {"succeeded": breaker.succeeded, "failed": breaker.failed, "abandoned": breaker.abandoned}[action]()


@pytest.mark.parametrize(("action", "column"), list(itertools.product(AFTER_ACTION, range(3))))
def test_action_in_each_state(action: str, column: int) -> None:
    """The state changes as in the table above, and `on_change` is called for changes only."""
    clock, changes = Clock(), list[int]()
    breaker = Breaker("x", clock=clock, on_change=lambda _name, state: changes.append(state))
    if column:
        breaker.force(CIRCUIT_STATE_OPEN)
    if column == 2:
        clock.now_s += 31
    assert breaker.state == STATES[column]
    changes.clear()
    act(breaker, clock, action)
    after = AFTER_ACTION[action][column]
    assert breaker.state == after
    assert changes[-1:] == [after] * (after != STATES[column])
