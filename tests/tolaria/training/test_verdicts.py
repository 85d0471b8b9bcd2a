from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL
from leyline.v1.state_pb2 import HardwareContext
from tolaria.jobs import Evaluation
from tolaria.training.judge import Health, Proceed, observe
from tolaria.training.reports import EpochReport, StepReport
from tolaria.training.verdicts import (
    Halt,
    HealthLimits,
    RateCut,
    Record,
    Retreat,
    RollbackBudget,
    Verdict,
    explosion_limit,
    judge_epoch,
    judge_step,
)

LIMITS = HealthLimits()
STEADY = Health(loss_ewma=2.0, gradient_norm_ewma=1.0, finite_steps=20)


def step(
    loss: float = 2.0, norm: float = 1.0, *, void: bool = False, rescaled: bool = False, at: int = 500
) -> StepReport:
    """A report of one step."""
    return StepReport(at, 1, loss, norm, 8, 0.1, 0.0, 0.0, void, rescaled=rescaled)


def epoch(correct: int, samples: int = 100) -> EpochReport:
    """A report of one epoch."""
    return EpochReport(3, 500, Evaluation(1.0, correct, samples), 1.0, 0.1, 0.0, {}, 0.0, HardwareContext())


@pytest.mark.parametrize(
    ("health", "report", "words"),
    [
        (STEADY, step(), None),
        (STEADY, step(loss=30.0), None),
        (STEADY, step(loss=30.1), "loss 30.1 exceeds 15 times its average 2"),
        (STEADY, step(norm=5.0), None),
        (STEADY, step(norm=5.1), "gradient norm 5.1 exceeds 5 times its average 1"),
        (STEADY, step(math.nan, 1.0, void=True), "not finite: loss nan, gradient norm 1"),
        (STEADY, step(2.0, math.inf, void=True), "not finite: loss 2, gradient norm inf"),
        (STEADY, step(2.0, math.inf, void=True, rescaled=True), None),
        (replace(STEADY, finite_steps=19), step(1e9, 1e9), None),
        (Health(), step(math.nan, math.nan, void=True), "not finite"),
        # Below zero: 14 sizes above the average, not 15 times a negative number.
        (replace(STEADY, loss_ewma=-2.0), step(loss=-1.0), None),
        (replace(STEADY, loss_ewma=-2.0), step(loss=26.1), "exceeds"),
        # Swinging around zero: six deviations.
        (replace(STEADY, loss_ewma=0.01, loss_variance=4.0), step(loss=12.0), None),
        (replace(STEADY, loss_ewma=0.01, loss_variance=4.0), step(loss=12.1), "exceeds"),
    ],
)
def test_what_a_step_leads_to(health: Health, report: StepReport, words: str | None) -> None:
    """Not finite, an exploded loss or gradient: a fast rollback that says why; anything else goes on."""
    verdict = judge_step(health, Record(), report, LIMITS)
    if words is None:
        assert verdict == Proceed()
    else:
        assert isinstance(verdict, Retreat)
        assert words in verdict.reason
        assert (verdict.tier, verdict.at_step, verdict.cut) == (ROLLBACK_TIER_FAST, 500, RateCut(0.5, 100))


def test_near_zero_the_run_s_own_scale_decides() -> None:
    """A run that has converged from 2.0 to nearly nothing is not rolled back for a loss that is still small for it."""
    converged = Health(loss_ewma=1e-6, gradient_norm_ewma=1e-6, log_norm_ewma=math.log(1e-6), finite_steps=500)
    record = Record(loss_level=2.0, norm_level=1.0)
    assert judge_step(converged, record, step(0.1, 0.01), LIMITS) == Proceed()
    assert isinstance(judge_step(converged, record, step(0.3, 0.01), LIMITS), Retreat)
    assert isinstance(judge_step(converged, record, step(0.1, 0.05), LIMITS), Retreat)


def test_the_scale_is_taken_after_the_warm_up() -> None:
    """The first averages are of an untrained model and do not count; the highest of the later ones does."""
    record = Record()
    for finite_steps, loss in [(1, 100.0), (19, 50.0), (20, 3.0), (21, 5.0), (22, 4.0)]:
        record = record.after_step(Health(loss_ewma=loss, gradient_norm_ewma=1.0, finite_steps=finite_steps), LIMITS)
    assert (record.loss_level, record.norm_level) == (5.0, 1.0)


@pytest.mark.parametrize(
    ("best", "correct", "tier"),
    [(0.9, 90, None), (0.9, 71, None), (0.9, 69, ROLLBACK_TIER_FULL), (0.0, 0, None), (0.15, 0, None)],
)
def test_what_an_epoch_leads_to(best: float, correct: int, tier: int | None) -> None:
    """More than the drop below the best: a full rollback; a job without accuracy never collapses."""
    verdict = judge_epoch(Record(best_accuracy=best), epoch(correct), LIMITS)
    if tier is None:
        assert verdict == Proceed()
    else:
        assert isinstance(verdict, Retreat)
        assert verdict.tier == tier
        assert verdict.reason == "validation accuracy fell to 0.690 from 0.900"


def test_the_best_accuracy_is_remembered() -> None:
    """A worse epoch does not lower it."""
    assert Record().after_epoch(epoch(80)).after_epoch(epoch(60)).best_accuracy == 0.8


def test_the_fourth_rollback_in_a_thousand_steps_halts() -> None:
    """Three are granted; then the same fault halts, saying both why; a thousand steps on there is budget again."""
    record = Record()
    verdicts: list[Verdict] = []
    for at in (100, 150, 120, 130):
        verdict = judge_step(STEADY, record, step(100.0, at=at), LIMITS)
        verdicts.append(verdict)
        if isinstance(verdict, Retreat):
            record = record.after_retreat(verdict, LIMITS)
    assert [type(verdict) for verdict in verdicts] == [Retreat, Retreat, Retreat, Halt]
    assert isinstance(verdicts[3], Halt)
    assert "loss 100" in verdicts[3].reason
    assert "3 automatic rollbacks in 1000 steps are spent" in verdicts[3].reason
    assert isinstance(judge_epoch(replace(record, best_accuracy=0.9), epoch(1), LIMITS), Halt)
    assert isinstance(judge_step(STEADY, record, step(100.0, at=1099), LIMITS), Halt)
    assert isinstance(judge_step(STEADY, record, step(100.0, at=1100), LIMITS), Retreat)


@given(st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=200), st.integers(1, 4), st.integers(1, 200))
def test_the_budget_holds_over_any_course(course: list[tuple[int, bool]], rollbacks_max: int, per_steps: int) -> None:
    """Whatever steps are made and undone, no window of steps ever sees more rollbacks begun than are allowed."""
    limits = HealthLimits(rollbacks_max=rollbacks_max, per_steps=per_steps)
    budget, begun, at = RollbackBudget(), [], 0
    for forward, wanted in course:
        at += forward
        if wanted and not budget.spent(at, limits):
            budget = budget.after(at, limits)
            begun.append(at)
            at = max(0, at - 50)
    for start in begun:
        assert sum(start - per_steps < other <= start for other in begun) <= rollbacks_max
    assert len(budget.begun_at) <= rollbacks_max


@given(st.floats(-1e6, 1e6), st.floats(1.5, 100), st.floats(0, 1e6), st.floats(1e-3, 1e3))
def test_the_limit_is_above_the_average_and_knows_no_unit(
    average: float, factor: float, level: float, unit: float
) -> None:
    """It never lies below the average, is `factor` times a large one, and grows with the loss's unit."""
    limit = explosion_limit(average, factor, level)
    assert limit >= average
    if average > level:
        assert limit == pytest.approx(factor * average)
    assert explosion_limit(average * unit, factor, level * unit) == pytest.approx(limit * unit, rel=1e-6, abs=1e-6)


@given(st.lists(st.floats(0.5, 2.0), min_size=25, max_size=200))
def test_an_ordinary_run_is_left_alone(losses: list[float]) -> None:
    """Losses and norms that stay within a factor of four lead to nothing, ever."""
    health, record = Health(), Record()
    for loss in losses:
        report = step(loss, loss)
        assert judge_step(health, record, report, LIMITS) == Proceed()
        health = observe(health, report)
        record = record.after_step(health, LIMITS)


@pytest.mark.parametrize("seed", range(5))
def test_norms_that_scatter_log_normally_are_left_alone(seed: int) -> None:
    """As those of a sound run do late in training, far beyond five times their average now and then."""
    draw = random.Random(seed)  # noqa: S311 - a repeatable draw is wanted
    health, record, highest = Health(), Record(), 0.0
    for number in range(4000):
        decay = math.exp(-number / 500)  # while it converges
        scatter = min(draw.lognormvariate(0.0, 0.9 - 0.7 * decay), 15.0)  # it grows while the average sinks
        report = step(0.05 + decay, (0.05 + decay) * scatter)
        assert judge_step(health, record, report, LIMITS) == Proceed()
        if number > LIMITS.warmup_steps:
            highest = max(highest, report.gradient_norm / health.gradient_norm_ewma)
        health = observe(health, report)
        record = record.after_step(health, LIMITS)
    assert highest > LIMITS.norm_factor
    assert isinstance(judge_step(health, record, step(0.05, 50.0), LIMITS), Retreat)


@pytest.mark.parametrize("growth", [1.3, 2.0, 10.0])
def test_a_run_that_diverges_is_caught(growth: float) -> None:
    """Losses and norms that grow by the same factor each step are caught well before they overflow."""
    health, record, value = Health(), Record(), 1.0
    for _ in range(40):
        health = observe(health, step(1.0, 1.0))
        record = record.after_step(health, LIMITS)
    for _ in range(30):
        value *= growth
        report = step(value, value)
        if isinstance(judge_step(health, record, report, LIMITS), Retreat):
            break
        health = observe(health, report)
        record = record.after_step(health, LIMITS)
    assert 5.0 < value < 200.0
