"""Schedules of learning rates that a job returns: they follow torch's, and are part of the training state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from leyline.v1.enums_pb2 import SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import SeedState
from support.lane_driver import DrivenLane, built, driven, running
from support.practice_jobs import SCHEDULERS, TOTAL
from tolaria.config import EarlyStoppingSettings
from tolaria.errors import BrokenJobError, ConfigurationError
from tolaria.lane.messages import (
    CaptureImage,
    ChangeOptimizer,
    EpochDone,
    ImageCaptured,
    LaneEnded,
    ReconcileSeeds,
    Restore,
    RunEpoch,
    StepDone,
)
from tolaria.values.optimization import OPERATOR, Adjustment

JOBS = "support.practice_jobs"


def lane_of(job: str, **options: Any) -> DrivenLane:
    """A driven lane of a job, whose epochs have 8 steps."""
    return driven(f"{JOBS}:{job}", **options)


def rates(lane: DrivenLane) -> list[float]:
    """The rates in the optimizer."""
    return [group["lr"] for group in lane.module.optimizer.param_groups]


def options_of(optimizer: torch.optim.Optimizer) -> list[tuple[float, float]]:
    """Rate and momentum by group."""
    return [(group["lr"], group["momentum"]) for group in optimizer.param_groups]


def bare_loop(kind: str, steps: int) -> list[list[tuple[float, float]]]:
    """What a loop sets before each step that steps the scheduler after each."""
    groups: list[dict[str, Any]] = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.02}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    scheduler, found = SCHEDULERS[kind](optimizer), []
    for _ in range(steps):
        found.append(options_of(optimizer))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:To get the last learning rate")
def test_rates_are_those_of_a_loop_with_torchs_scheduler(kind: str, early: bool) -> None:
    """And its momentum, also of one made in build_optimizer; a rollback, and another process, go on bit for bit."""
    lane = lane_of("Scheduled", scheduler=kind, early=early)
    expected = bare_loop(kind, TOTAL)
    found = []
    lane.train_to(5)
    with lane.capture() as image:
        for step in range(6, TOTAL + 1):
            lane.train_to(step)
            found.append(options_of(lane.module.optimizer))
        assert found == expected[5:]
        end = lane.digest
        assert lane.restore(5).state_digest == image.seal().total
        lane.train_to(TOTAL)
        assert lane.digest == end
        other = lane_of("Scheduled", scheduler=kind, early=early)
        other.restore(5, image)
        other.train_to(TOTAL)
    assert other.digest == end


def test_a_function_of_the_step_is_the_factor_of_the_rates() -> None:
    """It has no state, so that a rollback needs none."""
    lane = lane_of("Warmed")
    found = []
    for step in range(1, 13):
        lane.train_to(step)
        found += rates(lane)
    assert found == [0.01 * min(1.0, (step + 1) / 10) for step in range(12)]


def test_a_skipped_step_does_not_step_the_scheduler() -> None:
    """The fourth call of losses() is one of the first epoch's 8 steps, of which 7 are taken."""
    lane = lane_of("Scheduled", scheduler="ExponentialLR", nan_calls=[4])
    lane.train_to(8)
    assert lane.module.progress.number == 2
    assert rates(lane)[0] == pytest.approx(0.01 * 0.9**7)


def test_a_seed_has_its_share_of_the_first_groups_rate_and_the_scheduler_does_not_see_it() -> None:
    """Also across a rollback to before the graft."""
    lane = lane_of("Scheduled", scheduler="OneCycleLR")
    lane.snapshot()
    wish = ReconcileSeeds((SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp", slot="s"),))
    lane.train_to(8, {2: wish})
    body, _, seed = rates(lane)
    warmup = 0.1 + 0.9 * 5 / 100
    assert seed == pytest.approx(body * 0.1 * warmup)
    lane.restore(0)
    lane.train_to(8)
    assert rates(lane) == [body, pytest.approx(2 * body, rel=0.5)]


def test_an_adjustment_applies_on_top_of_the_schedule() -> None:
    """To a group that the job has named, from the step of the request on."""
    lane = lane_of("Scheduled", scheduler="ExponentialLR")
    lane.train_to(3)
    adjustment = Adjustment(group="head", factor=0.5, origin=OPERATOR, request_id="1", reason="test")
    lane.execute(ChangeOptimizer(adjustment, {}, None))
    lane.train_to(5)
    assert rates(lane) == [pytest.approx(0.01 * 0.9**4), pytest.approx(0.02 * 0.9**4 * 0.5)]


def test_a_plateau_of_a_metric_of_the_jobs_own_halves_the_rate_and_says_why() -> None:
    """After evaluations; a restore to the end of the epoch before repeats the decision bit for bit."""
    with running(built(f"{JOBS}:Plateau", options={"lr": 0.001}, deterministic=True)) as run:
        run.send(RunEpoch(1))
        assert run.wait_for(EpochDone).scheduled is None  # the first one is the best so far
        captured = run.done(run.send(CaptureImage())).result
        assert isinstance(captured, ImageCaptured)
        image = run.lane.images.take(captured.image_id)
        digests = []
        for turn in (1, 2):
            for number in (2 * turn, 2 * turn + 1):
                run.send(RunEpoch(number))
                epoch = run.wait_for(EpochDone, number=number)
                assert epoch.scheduled is not None
                assert epoch.scheduled.cause == f"mae {epoch.evaluation.figures()['mae']:g}"
                assert (
                    epoch.scheduled.before["host"]
                    == 2 * epoch.scheduled.after["host"]
                    == 0.001 / 2 ** (number - 2 * turn)
                )
            lane_state = run.done(run.send(CaptureImage())).result
            assert isinstance(lane_state, ImageCaptured)
            with run.lane.images.take(lane_state.image_id) as end:
                digests.append(end.seal().total)
            if turn == 1:
                image_id = run.lane.images.put(image)
                done = run.done(run.send(Restore(8, math.inf, image_id)))
                assert done.failure is None
        assert digests[0] == digests[1]
        assert run.all_of(StepDone)[-1].violations == ()


def test_metrics_that_an_evaluation_lacks_are_named() -> None:
    """With what names them: the scheduler is not stepped, and early stopping does not count."""
    sections = {"early_stopping": EarlyStoppingSettings(metric="f2", mode="max", patience=1)}
    with running(built(f"{JOBS}:Plateau", options={"monitor": "f1"}, sections=sections)) as run:
        for number in (1, 2):
            run.send(RunEpoch(number))
            epoch = run.wait_for(EpochDone, number=number)
            assert epoch.missing_metrics == {"lr_scheduler(): monitor": "f1", "early_stopping.metric": "f2"}
            assert (epoch.scheduled, epoch.stop) == (None, "")
    with running(built(f"{JOBS}:Plateau")) as run:
        run.send(RunEpoch(1))
        assert run.wait_for(EpochDone).missing_metrics == {}


def test_a_schedule_by_epoch_follows_epochs() -> None:
    """StepLR with a step of 3 epochs."""
    with running(
        built(f"{JOBS}:Scheduled", options={"scheduler": "StepLR", "interval": "epoch", "samples": 16})
    ) as run:
        for number in range(1, 5):
            run.send(RunEpoch(number))
        found = [run.wait_for(EpochDone, number=number) for number in range(1, 5)]
    assert [epoch.scheduled is not None for epoch in found] == [False, False, True, False]
    assert [epoch.learning_rates for epoch in found] == [{"body": 0.01, "head": 0.02}] * 2 + [
        {"body": 0.005, "head": 0.01}
    ] * 2


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("bare", r"returns a StepLR.*each update or each epoch.*LRSchedule\(scheduler, interval=\"step\"\)"),
        ("number", "must return a function of the step, a scheduler.*got a float"),
        ("mapping", "got a dict"),
        ("interval", 'interval must be "step" or "epoch", got \'batch\''),
        ("plateau", 'its interval has to be "epoch"'),
        ("other", "another optimizer than that of build_optimizer"),
        ("text", "gives 'fast', not a number, at step 0"),
        ("raises", r"lr_scheduler\(\) raised TypeError: NoneType is not an Optimizer"),
    ],
)
def test_what_is_no_schedule_is_refused_at_the_start(what: str, words: str) -> None:
    """With the method's name, and what to return instead."""
    with pytest.raises(BrokenJobError, match=words):
        built(f"{JOBS}:Returns", options={"what": what})


def test_none_leaves_the_schedule_to_the_settings() -> None:
    """As a job does whose schedule depends on its options."""
    assert built(f"{JOBS}:Returns", options={"what": "none"}).ready.schedule == ""


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nan", "gives the group 'host' the rate nan at 1"),
        ("after", "OneCycleLR of the job, by step: raised ValueError"),
    ],
)
def test_a_schedule_that_fails_later_ends_the_lane_with_its_name(what: str, words: str) -> None:
    """As any code of the job's."""
    with running(built(f"{JOBS}:Returns", options={"what": what})) as run:
        run.send(RunEpoch(1))
        failure = run.wait_for(LaneEnded).failure
    assert failure is not None
    assert words in str(failure)
    assert "lr_scheduler()" in str(failure)


def test_two_schedules_are_refused() -> None:
    """A warm-up of the settings is none: it multiplies."""
    from tolaria.config import OptimizerSettings

    with pytest.raises(ConfigurationError, match=r"optimizer.policy: is cosine, but the job schedules"):
        built(f"{JOBS}:Warmed", sections={"optimizer": OptimizerSettings(policy="cosine")})
    warmed = DrivenLane(built(f"{JOBS}:Warmed", sections={"optimizer": OptimizerSettings(warmup_steps=4)}))
    warmed.train_to(3)
    assert rates(warmed) == [pytest.approx(0.01 * 0.3 * 2 / 4)]
