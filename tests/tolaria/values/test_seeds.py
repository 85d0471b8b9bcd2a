from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from tolaria.values.seeds import Ramp, declared_ramp


@pytest.mark.parametrize(("step", "alpha"), [(0, 0.2), (9, 0.2), (10, 0.2), (12, 0.5), (14, 0.8), (99, 0.8)])
def test_alpha_is_linear_between_its_ends(step: int, alpha: float) -> None:
    """Alpha is linear between the schedule's ends and constant outside."""
    assert Ramp(0.2, 0.8, 10, 4).at(step) == pytest.approx(alpha, abs=1e-15)


def test_a_schedule_without_duration_jumps() -> None:
    """It jumps from start to end at `begin_step`."""
    assert [Ramp(0.0, 1.0, 3, 0).at(step) for step in (2, 3)] == [0.0, 1.0]


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**41))
def test_entering_a_schedule_never_jumps(start: float, end: float, begin: int, duration: int, step: int) -> None:
    """A seed that enters a schedule at any step does so at its start, and reaches its end."""
    ramp = Ramp(start, end, begin, duration).begun_at(step)
    assert ramp.at(step) == start
    assert ramp.at(ramp.begin_step + ramp.duration_steps) == end


def test_the_schedule_of_a_desired_state() -> None:
    """The schedule takes precedence; an older peer's bare number is a constant; a state may have neither."""
    schedule = AlphaSchedule(start=0.5, end=1.0, begin_step=7, duration_steps=2)
    assert declared_ramp(SeedState(alpha=schedule, metrics={"alpha": 0.1})) == Ramp(0.5, 1.0, 7, 2)
    assert declared_ramp(SeedState(metrics={"alpha": 0.25})) == Ramp(0.25, 0.25, 0, 0)
    assert declared_ramp(SeedState()) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1])
def test_alphas_outside_0_to_1_are_a_problem(value: float) -> None:
    """Both ends are checked."""
    assert Ramp(0.0, value, 0, 1).problem() is not None
    assert Ramp(value, 1.0, 0, 1).problem() is not None
    assert Ramp(0.0, 1.0, 0, 1).problem() is None
