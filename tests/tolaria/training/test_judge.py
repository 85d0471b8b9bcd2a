from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolaria.training.judge import Health, Hold, Proceed, forgive, judge, observe
from tolaria.training.reports import StepReport


def step(loss: float = 1.0, norm: float = 1.0, *, void: bool = False) -> StepReport:
    """A report of one step."""
    return StepReport(1, 1, loss, norm, 8, 0.1, 0.0, 0.0, void)


def after(*steps: StepReport) -> Health:
    """The health after these steps."""
    health = Health()
    for one in steps:
        health = observe(health, one)
    return health


@pytest.mark.parametrize(("streak", "verdict"), [(0, Proceed), (1, Proceed), (2, Proceed), (3, Hold), (4, Hold)])
def test_void_steps_in_a_row_hold_the_run(streak: int, verdict: type) -> None:
    """Up to the bound training goes on; from it on the run is held, with the reason."""
    found = judge(after(*[step(void=True)] * streak), void_steps_max=3)
    assert isinstance(found, verdict)
    if isinstance(found, Hold):
        assert f"{streak} steps in a row were not finite" in found.reason


def test_a_finite_step_or_an_operator_ends_the_row() -> None:
    """Only void steps in a row count."""
    assert after(step(void=True), step(), step(void=True)).void_streak == 1
    assert forgive(after(step(void=True))).void_streak == 0


def test_averages_start_at_the_first_step_and_follow() -> None:
    """The first finite step sets the averages; later ones pull them a twentieth of the way."""
    health = after(step(2.0, 4.0), step(4.0, 4.0))
    assert health.loss_ewma == pytest.approx(2.1)
    assert health.gradient_norm_ewma == 4.0
    assert health.loss_delta == pytest.approx(2.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=200, max_size=200))
def test_the_variance_is_never_negative(losses: list[float]) -> None:
    """Whatever the losses, the variance stays a variance and void steps leave it alone."""
    health = after(*[step(loss) for loss in losses])
    assert health.loss_variance >= 0
    assert min(losses) - 1 <= health.loss_ewma <= max(losses) + 1
    assert observe(health, step(math.nan, void=True)).loss_ewma == health.loss_ewma


def test_the_variance_of_a_steady_wobble_is_found() -> None:
    """For losses that alternate around a mean the estimate comes near the true variance."""
    losses = [1.0, 3.0] * 200
    assert after(*[step(loss) for loss in losses]).loss_variance == pytest.approx(statistics.pvariance(losses), rel=0.1)
