from __future__ import annotations

import math

from leyline.v1.enums_pb2 import SEED_STAGE_GERMINATED, SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import HardwareContext
from tolaria.jobs import Evaluation
from tolaria.training.place import EpochPlace
from tolaria.training.progress import EpochSums, Progress
from tolaria.training.reports import EpochReport, StepReport


def step(loss: float, *, void: bool = False) -> StepReport:
    """A step of 8 samples in 0.25 s, of which it waited 0.125 s for them."""
    return StepReport(
        1, 1, loss, gradient_norm=loss / 2, samples=8, duration_s=0.25, input_wait_s=0.125, finished_at_s=0.0, void=void
    )


def progress() -> Progress:
    """A run that has not begun."""
    return Progress("run", "job", "test", epochs=2, steps_per_epoch=8, started_at_s=0.0)


def test_sums_are_over_finite_steps_and_times_over_all() -> None:
    """A void step leaves the loss and the norm as they were."""
    sums = EpochSums()
    for one in (step(2.0), step(4.0), step(math.nan, void=True)):
        sums.add(one)
    assert (sums.steps, sums.void_steps, sums.samples) == (2, 1, 24)
    assert (sums.loss, sums.gradient_norm) == (3.0, 2.0)
    assert (sums.duration_s, sums.input_wait_s, sums.samples_per_s) == (0.75, 0.375, 32.0)


def test_before_the_first_step_there_is_no_loss_and_no_throughput() -> None:
    """Nothing is divided by nothing."""
    assert math.isnan(EpochSums().loss)
    assert EpochSums().samples_per_s == 0.0


def test_after_going_back_sums_are_the_places_and_times_go_on() -> None:
    """Counts and losses are those of the place; what the time was spent on is not undone."""
    sums = EpochSums()
    sums.add(step(9.0))
    sums.take_over(EpochPlace(1, over=False, batches=4, steps=3, void_steps=1, samples=32, loss_sum=6.0))
    assert (sums.steps, sums.void_steps, sums.samples, sums.loss) == (3, 1, 32, 2.0)
    assert sums.duration_s == 0.25


def test_a_new_epoch_has_sums_of_its_own() -> None:
    """Its number is told, and nothing is counted yet."""
    run = progress()
    run.sums.add(step(2.0))
    run.begin_epoch(2)
    assert (run.epoch, run.sums) == (2, EpochSums())


def test_seeds_are_told_as_they_are_and_else_as_they_are_desired() -> None:
    """Each once: in the order desired, then those that nobody desires and that still are in the model."""
    run = progress()
    run.desired = [SeedState(seed_id=name, stage=SEED_STAGE_GERMINATED) for name in ("a", "b")]
    run.grafted = [SeedState(seed_id=name, stage=SEED_STAGE_TRAINING) for name in ("c", "b")]
    assert [(seed.seed_id, seed.stage) for seed in run.seeds] == [
        ("a", SEED_STAGE_GERMINATED),
        ("b", SEED_STAGE_TRAINING),
        ("c", SEED_STAGE_TRAINING),
    ]


def test_validation_is_that_of_the_last_epoch() -> None:
    """Not a number before there is one."""
    run = progress()
    assert math.isnan(run.validation_accuracy)
    assert math.isnan(run.validation_loss)
    run.last_epoch = EpochReport(
        1, 8, Evaluation(4.0, 6, 8), 1.0, 0.1, 0.0, learning_rates={}, momentum=0.0, hardware=HardwareContext()
    )
    assert (run.validation_accuracy, run.validation_loss) == (0.75, 0.5)
