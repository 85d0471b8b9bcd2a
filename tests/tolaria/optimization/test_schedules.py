from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tolaria.config import OptimizerSettings
from tolaria.errors import ScheduleError
from tolaria.optimization.schedules import Constant, Cosine, Policy, Schedule, StepDecay, Warmup, build_schedule

FRACTIONS = st.floats(0.0, 1.0)
POLICIES = st.one_of(
    st.builds(Constant),
    st.builds(Cosine, st.integers(1, 500), FRACTIONS, st.booleans()),
    st.builds(StepDecay, st.integers(1, 500), st.floats(0.01, 1.0), FRACTIONS),
)
WARMUPS = st.builds(Warmup, st.integers(0, 500), FRACTIONS)
NO_WARMUP = Warmup(0, 0.0)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Constant(), [1, 1, 1, 1, 1, 1, 1]),
        (Cosine(4, 0.0, restarts=True), [1, 0.5, 1, 0.5, 1, 0.5, 1]),
        (Cosine(4, 0.0, restarts=False), [1, 0.5, 0, 0, 0, 0, 0]),
        (Cosine(4, 0.2, restarts=True), [1, 0.6, 1, 0.6, 1, 0.6, 1]),
        (Cosine(4, 0.2, restarts=False), [1, 0.6, 0.2, 0.2, 0.2, 0.2, 0.2]),
        (StepDecay(4, 0.5, 0.0), [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]),
        (StepDecay(4, 0.5, 0.2), [1, 1, 0.5, 0.5, 0.25, 0.25, 0.2]),
    ],
)
def test_each_policy_follows_its_formula_over_three_periods(policy: Policy, expected: list[float]) -> None:
    """The factors at 0, 1/2, 1, 3/2, 2, 5/2 and 3 periods of four steps are those of the formula."""
    assert [policy.factor_at(step) for step in range(0, 13, 2)] == pytest.approx(expected)


def test_a_restarting_cosine_is_low_before_it_restarts() -> None:
    """The last step of a period has the formula's value, the next one is at 1."""
    cosine = Cosine(10, 0.1, restarts=True)
    assert cosine.factor_at(9) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.9)) / 2)
    assert cosine.factor_at(10) == 1.0


def test_warmup_is_linear_from_its_floor() -> None:
    """Four steps of warm-up from a tenth rise by equal amounts, then the policy starts."""
    schedule = Schedule(StepDecay(2, 0.5, 0.0), Warmup(4, 0.2))
    assert [schedule.factor_at(step) for step in range(8)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 0.5, 0.5])


@given(policy=POLICIES, warmup=WARMUPS, periods=st.floats(0.0, 3.0))
def test_factors_stay_within_zero_and_one(policy: Policy, warmup: Warmup, periods: float) -> None:
    """No factor is above 1, below 0, or below the lower of the floors."""
    span = getattr(policy, "period_steps", None) or getattr(policy, "every_steps", None) or 100
    step = int(warmup.steps * min(periods, 1.0) + span * periods)
    factor = Schedule(policy, warmup).factor_at(step)
    assert 0.0 <= factor <= 1.0
    assert factor >= min(warmup.floor, getattr(policy, "floor", 1.0))


@given(policy=POLICIES, warmup=WARMUPS)
def test_nothing_jumps_at_the_end_of_the_warmup(policy: Policy, warmup: Warmup) -> None:
    """At the end of the warm-up the factor rises by one increment to exactly 1."""
    schedule = Schedule(policy, warmup)
    assert schedule.factor_at(warmup.steps) == 1.0
    if warmup.steps:
        increment = (1.0 - warmup.floor) / warmup.steps
        assert schedule.factor_at(warmup.steps - 1) == pytest.approx(1.0 - increment, abs=1e-12)


@given(warmup=WARMUPS, step=st.integers(0, 600))
def test_warmup_never_falls(warmup: Warmup, step: int) -> None:
    """The factor never falls during a warm-up."""
    assert warmup.factor_at(step) <= warmup.factor_at(step + 1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Schedule(Constant(), NO_WARMUP)),
        ({"policy": "cosine", "warmup_steps": 10}, Schedule(Cosine(90, 0.0, restarts=False), Warmup(10, 0.0))),
        (
            {"policy": "cosine", "period_steps": 7, "floor": 0.1, "after_period": "restart"},
            Schedule(Cosine(7, 0.1, restarts=True), NO_WARMUP),
        ),
        ({"policy": "step", "period_steps": 7, "decay": 0.3}, Schedule(StepDecay(7, 0.3, 0.0), NO_WARMUP)),
    ],
)
def test_settings_become_a_schedule(fields: dict[str, Any], expected: Schedule) -> None:
    """Each policy has a name; a cosine without a period takes the rest of the run after the warm-up."""
    assert build_schedule(OptimizerSettings(**fields), 100) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": "linear"},
        {"period_steps": -1},
        {"after_period": "stop"},
        {"floor": math.nan},
        {"decay": 0.0},
        {"decay": 1.5},
        {"warmup_steps": -1},
        {"warmup_floor": -0.1},
        {"seed_factor": 0.0},
        {"seed_factor": 1.5},
        {"lr_floor": math.nan},
        {"lr_ceiling": math.inf},
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any]) -> None:
    """The error names the setting."""
    with pytest.raises(ValidationError, match=next(iter(fields))):
        OptimizerSettings(**fields)


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    """The warm-up must not exceed the run."""
    build_schedule(OptimizerSettings(warmup_steps=100), 100)
    with pytest.raises(ScheduleError, match="warmup_steps: 101 is longer than the run of 100 steps") as caught:
        build_schedule(OptimizerSettings(warmup_steps=101), 100)
    assert caught.value.field == "warmup_steps"
