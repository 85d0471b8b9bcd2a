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
from tolaria.resilience.breaker import (
    TRANSITIONS,
    Breaker,
    BreakerStatus,
    Signal,
    transition,
)

STATES = (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(("state", "signal"), list(itertools.product(STATES, Signal)))
def test_every_state_and_signal(state: CircuitBreakerState.ValueType, signal: Signal) -> None:
    """The table decides every move; what it does not list raises and changes nothing."""
    before = BreakerStatus(state, failures=1, opened_at_s=5.0)
    if (state, signal) in TRANSITIONS:
        assert transition(before, signal, now_s=9.0).state == TRANSITIONS[state, signal]
    else:
        with pytest.raises(IllegalTransitionError):
            transition(before, signal, now_s=9.0)
        assert before == BreakerStatus(state, failures=1, opened_at_s=5.0)


def test_only_cooling_down_out_of_the_blue_is_illegal() -> None:
    """The table is complete but for cooling down what is not open."""
    missing = set(itertools.product(STATES, Signal)) - set(TRANSITIONS)
    assert missing == {(CIRCUIT_STATE_CLOSED, Signal.COOLED_DOWN), (CIRCUIT_STATE_HALF_OPEN, Signal.COOLED_DOWN)}


def test_opens_at_the_third_failure_and_closes_after_one_success() -> None:
    """Three failures in a row open it; after 30 s one trial is let through, and its success closes it."""
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
    assert not breaker.allows()  # the trial is still running
    breaker.succeeded()
    assert breaker.allows()
    assert changes == [CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN, CIRCUIT_STATE_CLOSED]


def test_a_success_in_between_starts_the_count_anew() -> None:
    """Only failures in a row open it."""
    breaker = Breaker("x", clock=Clock())
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.state == CIRCUIT_STATE_CLOSED


def test_an_abandoned_trial_lets_another_one_through() -> None:
    """A cancelled call neither closes nor opens a half-open breaker, and does not block it for ever."""
    clock = Clock()
    breaker = Breaker("x", clock=clock)
    breaker.force(CIRCUIT_STATE_OPEN)
    clock.now_s += 31
    assert breaker.allows()
    breaker.abandoned()
    assert breaker.allows()


def test_a_failed_trial_opens_it_for_another_full_time() -> None:
    """Half open and failed again: the cooling starts anew."""
    clock = Clock()
    breaker = Breaker("x", clock=clock)
    breaker.force(CIRCUIT_STATE_OPEN)
    clock.now_s += 31
    assert breaker.allows()
    breaker.failed()
    clock.now_s += 29
    assert not breaker.allows()


@pytest.mark.parametrize("state", [CIRCUIT_STATE_UNKNOWN, CIRCUIT_STATE_HALF_OPEN])
def test_it_can_be_forced_open_or_closed_only(state: CircuitBreakerState.ValueType) -> None:
    """Nobody can order a breaker into a state that means waiting."""
    with pytest.raises(ValueError, match="forced open or closed"):
        Breaker("x", clock=Clock()).force(state)


@given(st.lists(st.sampled_from(["ok", "fail", "wait", "abandon", "force_open", "force_closed"]), max_size=60))
def test_no_sequence_breaks_it(steps: list[str]) -> None:
    """Whatever happens, it never raises, is never called open, and three failures in a row open it."""
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


# What becomes of a breaker in each state (columns: closed, open, half open) by each thing that can happen to its shell.
SHELL = {
    "succeeded": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_CLOSED),
    "failed": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_OPEN),
    "failed three times": (CIRCUIT_STATE_OPEN, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_OPEN),
    "abandoned": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN),
    "waited 29 s": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN),
    "waited 31 s": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_HALF_OPEN, CIRCUIT_STATE_HALF_OPEN),
    "forced open": (CIRCUIT_STATE_OPEN, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_OPEN),
    "forced closed": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_CLOSED),
    "forced half open": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN),
    "forced to nothing": (CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN, CIRCUIT_STATE_HALF_OPEN),
}


def happens(breaker: Breaker, clock: Clock, what: str) -> None:
    """Let something happen to it; orders that make no sense raise, and their changes would show."""
    match what.split():
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
                breaker.force(CIRCUIT_STATE_UNKNOWN if what.endswith("nothing") else CIRCUIT_STATE_HALF_OPEN)
        case _:
            {"succeeded": breaker.succeeded, "failed": breaker.failed, "abandoned": breaker.abandoned}[what]()


@pytest.mark.parametrize(("what", "column"), list(itertools.product(SHELL, range(3))))
def test_the_shell_in_every_state(what: str, column: int) -> None:
    """As the table above says; observers are told of changes and of nothing else."""
    clock, changes = Clock(), list[int]()
    breaker = Breaker("x", clock=clock, on_change=lambda _name, state: changes.append(state))
    if column:
        breaker.force(CIRCUIT_STATE_OPEN)
    if column == 2:
        clock.now_s += 31
    assert breaker.state == STATES[column]
    changes.clear()
    happens(breaker, clock, what)
    assert breaker.state == SHELL[what][column]
    assert changes[-1:] == [SHELL[what][column]] * (SHELL[what][column] != STATES[column])
