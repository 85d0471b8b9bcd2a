from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL
from leyline.v1.state_pb2 import HardwareContext
from tolaria.config import RollbackSettings
from tolaria.lane.messages import EpochDone, StepDone
from tolaria.run.health import (
    Averages,
    Halt,
    Health,
    Proceed,
    RateCut,
    Record,
    Retreat,
    RollbackBudget,
    Verdict,
    explosion_limit,
    judge_epoch,
    judge_step,
)
from tolaria.values.training import Evaluation

LIMITS = RollbackSettings()
STEADY = Averages(loss=2.0, gradient_norm=1.0, finite_steps=20)


def step(
    loss: float = 2.0, norm: float = 1.0, *, skipped: bool = False, rescaled: bool = False, at: int = 500
) -> StepDone:
    """Returns one step."""
    return StepDone(at, 1, loss, norm, 8, 0.1, 0.0, 0.0, skipped, rescaled=rescaled)


def epoch(correct: int, samples: int = 100) -> EpochDone:
    """Returns one epoch."""
    return EpochDone(3, 500, Evaluation(1.0, correct, samples), 1.0, 0.0, {}, 0.0, HardwareContext())


@pytest.mark.parametrize(
    ("health", "report", "words"),
    [
        (STEADY, step(), None),
        (STEADY, step(loss=30.0), None),
        (STEADY, step(loss=30.1), "loss 30.1 exceeds 15 times its average 2"),
        (STEADY, step(norm=5.0), None),
        (STEADY, step(norm=5.1), "gradient norm 5.1 exceeds 5 times its average 1"),
        (STEADY, step(math.nan, 1.0, skipped=True), "not finite: loss nan, gradient norm 1"),
        (STEADY, step(2.0, math.inf, skipped=True), "not finite: loss 2, gradient norm inf"),
        (STEADY, step(2.0, math.inf, skipped=True, rescaled=True), None),
        (replace(STEADY, finite_steps=19), step(1e9, 1e9), None),
        (Averages(), step(math.nan, math.nan, skipped=True), "not finite"),
        # Below zero: 14 sizes above the average, not 15 times a negative number.
        (replace(STEADY, loss=-2.0), step(loss=-1.0), None),
        (replace(STEADY, loss=-2.0), step(loss=26.1), "exceeds"),
        # Swinging around zero: six deviations.
        (replace(STEADY, loss=0.01, loss_variance=4.0), step(loss=12.0), None),
        (replace(STEADY, loss=0.01, loss_variance=4.0), step(loss=12.1), "exceeds"),
    ],
)
def test_what_a_step_leads_to(health: Averages, report: StepDone, words: str | None) -> None:
    """Not finite, an exploded loss or gradient: a fast rollback that says why; anything else goes on."""
    verdict = judge_step(health, Record(), report, LIMITS)
    if words is None:
        assert verdict == Proceed()
    else:
        assert isinstance(verdict, Retreat)
        assert words in verdict.reason
        assert (verdict.tier, verdict.at_step, verdict.cut) == (ROLLBACK_TIER_FAST, 500, RateCut(0.5, 100))


def test_near_zero_the_scale_of_the_run_decides() -> None:
    """A run that has converged from 2.0 to nearly nothing is not rolled back for a loss that is still small for it."""
    converged = Averages(loss=1e-6, gradient_norm=1e-6, log_norm=math.log(1e-6), finite_steps=500)
    record = Record(loss_level=2.0, norm_level=1.0)
    assert judge_step(converged, record, step(0.1, 0.01), LIMITS) == Proceed()
    assert isinstance(judge_step(converged, record, step(0.3, 0.01), LIMITS), Retreat)
    assert isinstance(judge_step(converged, record, step(0.1, 0.05), LIMITS), Retreat)


def test_the_scale_is_taken_after_the_warm_up() -> None:
    """The first averages are of an untrained model and do not count; the highest of the later ones does."""
    record = Record()
    for finite_steps, loss in [(1, 100.0), (19, 50.0), (20, 3.0), (21, 5.0), (22, 4.0)]:
        record = record.after_step(Averages(loss=loss, gradient_norm=1.0, finite_steps=finite_steps), LIMITS)
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
    limits = RollbackSettings(automatic_max=rollbacks_max, per_steps=per_steps)
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
def test_the_limit_is_above_the_average_and_scales_with_the_unit(
    average: float, factor: float, level: float, unit: float
) -> None:
    """It never lies below the average, is `factor` times a large one, and grows with the loss's unit."""
    limit = explosion_limit(average, factor, level)
    assert limit >= average
    if average > level:
        assert limit == pytest.approx(factor * average)
    assert explosion_limit(average * unit, factor, level * unit) == pytest.approx(limit * unit, rel=1e-6, abs=1e-6)


@given(st.lists(st.floats(0.5, 2.0), min_size=25, max_size=200))
def test_an_ordinary_run_proceeds(losses: list[float]) -> None:
    """Losses and norms that stay within a factor of four lead to nothing, ever."""
    health, record = Averages(), Record()
    for loss in losses:
        report = step(loss, loss)
        assert judge_step(health, record, report, LIMITS) == Proceed()
        health = health.after(report)
        record = record.after_step(health, LIMITS)


@pytest.mark.parametrize("seed", range(5))
def test_norms_that_scatter_log_normally_proceed(seed: int) -> None:
    """As those of a sound run do late in training, far beyond five times their average now and then."""
    draw = random.Random(seed)  # noqa: S311 - a repeatable draw is wanted
    health, record, highest = Averages(), Record(), 0.0
    for number in range(4000):
        decay = math.exp(-number / 500)  # while it converges
        scatter = min(draw.lognormvariate(0.0, 0.9 - 0.7 * decay), 15.0)  # it grows while the average sinks
        report = step(0.05 + decay, (0.05 + decay) * scatter)
        assert judge_step(health, record, report, LIMITS) == Proceed()
        if number > LIMITS.warmup_steps:
            highest = max(highest, report.gradient_norm / health.gradient_norm)
        health = health.after(report)
        record = record.after_step(health, LIMITS)
    assert highest > LIMITS.norm_factor
    assert isinstance(judge_step(health, record, step(0.05, 50.0), LIMITS), Retreat)


@pytest.mark.parametrize("growth", [1.3, 2.0, 10.0])
def test_a_run_that_diverges_is_caught(growth: float) -> None:
    """Losses and norms that grow by the same factor each step are caught well before they overflow."""
    health, record, value = Averages(), Record(), 1.0
    for _ in range(40):
        health = health.after(step(1.0, 1.0))
        record = record.after_step(health, LIMITS)
    for _ in range(30):
        value *= growth
        report = step(value, value)
        if isinstance(judge_step(health, record, report, LIMITS), Retreat):
            break
        health = health.after(report)
        record = record.after_step(health, LIMITS)
    assert 5.0 < value < 200.0


# -- averages


def after(*steps: StepDone) -> Averages:
    """Returns the averages after these steps."""
    averages = Averages()
    for one in steps:
        averages = averages.after(one)
    return averages


@pytest.mark.parametrize(("streak", "too_many"), [(0, False), (1, False), (2, False), (3, True), (4, True)])
def test_skipped_steps_in_a_row_are_counted(streak: int, too_many: bool) -> None:
    """From the bound on there are too many."""
    health = Health(RollbackSettings(automatic=False))
    for _ in range(streak):
        health.step(step(skipped=True), rolling_back=False)
    assert health.skipped_too_many(3) is too_many
    health.forgive_skipped_steps()
    assert not health.skipped_too_many(3)


def test_a_finite_step_ends_the_streak() -> None:
    """Only skipped steps in a row count."""
    assert after(step(skipped=True), step(), step(skipped=True)).skipped_streak == 1


def test_averages_start_at_the_first_step_and_follow() -> None:
    """The first finite step sets the averages; later ones pull them a twentieth of the way."""
    health = after(step(2.0, 4.0), step(4.0, 4.0))
    assert health.loss == pytest.approx(2.1)
    assert health.gradient_norm == 4.0
    assert health.loss_delta == pytest.approx(2.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=200, max_size=200))
def test_the_variance_is_never_negative(losses: list[float]) -> None:
    """Whatever the losses, the variance stays a variance and skipped steps do not change it."""
    health = after(*[step(loss) for loss in losses])
    assert health.loss_variance >= 0
    assert min(losses) - 1 <= health.loss <= max(losses) + 1
    assert health.after(step(math.nan, skipped=True)).loss == health.loss


def test_the_variance_of_a_steady_wobble_is_found() -> None:
    """For losses that alternate around a mean the estimate comes near the true variance."""
    losses = [1.0, 3.0] * 200
    assert after(*[step(loss) for loss in losses]).loss_variance == pytest.approx(statistics.pvariance(losses), rel=0.1)


# -- the health of a run

SETTINGS = RollbackSettings(warmup_steps=5, automatic_max=2)


def numbered(number: int, loss: float, *, epoch: int = 1, place: int = 0) -> StepDone:
    """One update on the batch at that place."""
    return StepDone(number, epoch, loss, 1.0, 8, 0.1, 0.0, 0.0, batches=range(place, place + 1))


def evaluated(accuracy: float) -> EpochDone:
    """An epoch with that validation accuracy."""
    result = Evaluation(1.0, int(accuracy * 100), 100)
    return EpochDone(2, 100, result, 1.0, 0.0, {}, 0.0, HardwareContext())


def trained(health: Health, steps: int, loss: float) -> None:
    """Counts that many healthy steps."""
    for number in range(steps):
        assert health.step(numbered(number, loss), rolling_back=False) == Proceed()


def test_batches_of_unhealthy_steps_are_returned_once() -> None:
    """The step that begins the way back, and what goes wrong until it is over; healthy ones in between are not."""
    health = Health(SETTINGS)
    trained(health, 10, 1.0)
    assert isinstance(health.step(numbered(11, 100.0, place=3), rolling_back=False), Retreat)
    assert health.step(numbered(12, 1.0, place=4), rolling_back=True) == Proceed()
    assert health.step(numbered(13, 200.0, place=5), rolling_back=True) == Proceed()
    assert health.epoch(evaluated(0.0), rolling_back=False) == Proceed()
    assert health.end_retreat() == ((1, 3), (1, 5))
    assert health.end_retreat() == ()
    assert isinstance(health.step(numbered(14, 100.0), rolling_back=False), Retreat)
    health.end_retreat()
    assert isinstance(health.step(numbered(15, 100.0), rolling_back=False), Halt)


def test_a_resumed_run_is_measured_as_before() -> None:
    """What was no explosion for the whole run is none after its restart; a budget that was spent stays spent."""
    before = Health(SETTINGS)
    trained(before, 10, 2.0)
    assert before.epoch(evaluated(0.9), rolling_back=False) == Proceed()
    after = Health(SETTINGS, before.to_json())
    trained(after, 10, 0.001)
    small = numbered(11, 0.2)  # 200 times the average of late, a tenth of what the run began with
    assert after.step(small, rolling_back=False) == Proceed()
    fresh = Health(SETTINGS)
    trained(fresh, 10, 0.001)
    assert isinstance(fresh.step(small, rolling_back=False), Retreat)
    assert isinstance(after.epoch(evaluated(0.5), rolling_back=False), Retreat)
    after.end_retreat()
    assert isinstance(after.step(numbered(12, 50.0), rolling_back=False), Retreat)
    again = Health(SETTINGS, after.to_json())
    trained(again, 10, 0.001)
    assert isinstance(again.step(numbered(13, 50.0), rolling_back=False), Halt)


@pytest.mark.parametrize("scale", ["", "{", "[]", '{"loss_level": "much"}'])
def test_an_unreadable_record_is_a_new_one(scale: str) -> None:
    """A journal with other content does not prevent a start."""
    assert Health(SETTINGS, scale).to_json() == Health(SETTINGS).to_json()


def test_nothing_is_judged_without_automatic_rollbacks() -> None:
    """Without automatic rollbacks there are no verdicts."""
    health = Health(RollbackSettings(automatic=False))
    trained(health, 30, 1.0)
    assert health.step(numbered(31, 1e9), rolling_back=False) == Proceed()
    assert health.epoch(evaluated(0.9), rolling_back=False) == Proceed()
    assert health.epoch(evaluated(0.0), rolling_back=False) == Proceed()


def test_the_healthy_step_ends_where_it_went_wrong() -> None:
    """Not with a step that exploded, nor with one on the way back; a collapse takes the epoch's steps back."""
    health = Health(SETTINGS)
    trained(health, 10, 1.0)
    assert health.healthy_step == 9
    assert isinstance(health.step(numbered(10, 100.0), rolling_back=False), Retreat)
    assert health.step(numbered(11, 1.0), rolling_back=False) == Proceed()
    assert health.healthy_step == 9
    health.end_retreat()
    assert health.epoch(replace(evaluated(0.9), global_step=9), rolling_back=False) == Proceed()
    assert health.step(numbered(12, 1.0), rolling_back=False) == Proceed()
    assert health.healthy_step == 12
    assert isinstance(health.epoch(evaluated(0.1), rolling_back=False), Retreat)
    assert health.healthy_step == 9


def test_an_operators_rollback_costs_nothing_of_the_automatic_ones() -> None:
    """What goes wrong while it is under way begins nothing and spends no budget; its batches are still returned."""
    health = Health(SETTINGS)
    trained(health, 10, 1.0)
    before = health.to_json()
    assert health.step(numbered(11, 100.0, place=3), rolling_back=True) == Proceed()
    assert health.epoch(evaluated(0.0), rolling_back=True) == Proceed()
    assert health.to_json() == before
    assert health.healthy_step == 9
    assert health.end_retreat() == ((1, 3),)
    assert isinstance(health.step(numbered(12, 100.0), rolling_back=False), Retreat)
