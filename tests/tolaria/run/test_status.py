from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.json_format import MessageToJson

from leyline.v1.admin_service_pb2 import (
    RUN_STATE_DRAINING,
    RUN_STATE_FAILED,
    RUN_STATE_HALTED,
    RUN_STATE_PAUSED,
    RUN_STATE_RUNNING,
    RunState,
)
from leyline.v1.enums_pb2 import (
    EMERGENCY_LEVEL_ELEVATED,
    EMERGENCY_LEVEL_HALT,
    EMERGENCY_LEVEL_NOTICE,
    EMERGENCY_LEVEL_UNSPECIFIED,
    HEALTH_STATUS_CRITICAL,
    HEALTH_STATUS_DEGRADED,
    HEALTH_STATUS_HEALTHY,
    HEALTH_STATUS_UNHEALTHY,
    SEED_STAGE_FOSSILIZED,
    SEED_STAGE_GERMINATED,
    SEED_STAGE_TRAINING,
    HealthStatus,
)
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import HardwareContext
from tolaria.lane.messages import EpochDone, Restored, StepDone
from tolaria.run.conditions import Conditions, health_of
from tolaria.run.pace import EpochSums, Pace
from tolaria.run.status import RunStatus, epoch_packet, status_message
from tolaria.values.evaluation import Evaluation
from tolaria.values.loss_window import Averages
from tolaria.values.optimization import ActiveAdjustment, Adjustment
from tolaria.values.seeds import SeedLimits
from tolaria.values.training import EpochProgress, Position

EPOCH = EpochDone(2, 30, Evaluation(8.0, 3, 4), 1.5, 50.0, {"host": 0.01}, 0.9, HardwareContext(device_type="cpu"), 2.0)


def fresh() -> RunStatus:
    """Returns the status of a run that has not started."""
    return RunStatus("run", "digits", "exp", epochs=5, started_at_s=10.0)


def training() -> RunStatus:
    """Returns the status of a run in its second epoch."""
    made = fresh()
    made.begin_epoch(2)
    for loss in (1.0, 3.0):
        made.sums.add(StepDone(30, 2, loss, 0.5, 8, 0.1, 0.05, 50.0))
    return made


def test_the_packet_has_the_state_of_the_run() -> None:
    """Fields and metric keys of the contract are filled from the epoch."""
    packet = epoch_packet(training(), Averages(), EPOCH, wall_ns=123)
    assert (packet.version, packet.current_epoch, packet.global_step, packet.timestamp_ns) == (1, 2, 30, 123)
    assert (packet.training_loss, packet.validation_loss, packet.validation_accuracy) == (2.0, 2.0, 0.75)
    assert (packet.training_run_id, packet.experiment_name, packet.source_subsystem) == ("run", "exp", "tolaria")
    metrics = packet.training_metrics
    assert metrics["samples_per_s"] == 80
    assert metrics["latency_ms"] == 1500
    assert metrics["optimizer_lr"] == pytest.approx(0.01)
    assert metrics["input_wait_ms"] == pytest.approx(50)
    assert packet.packet_id != epoch_packet(training(), Averages(), EPOCH, wall_ns=123).packet_id


def test_the_keys_are_those_of_the_contract() -> None:
    """All keys that the contract lists are sent, and no other."""
    known = {
        "loss", "accuracy", "gradient_norm", "samples_per_s", "latency_ms", "loss_delta", "loss_ewma",
        "loss_volatility", "grad_norm_ewma", "grad_var", "grad_conflict_rate", "optimizer_lr", "optimizer_momentum",
        "input_wait_ms", "h2d_copy_ms", "tamiyo_latency_ms", "kasmina.apply_ms",
        "kasmina.finalize_ms", "step_latency_ms",
        "hook_latency_ms", "gpu_mem_used_gb", "gpu_mem_free_gb", "gpu_util_percent", "cpu_util_percent",
        "seeds.slots_free", "seeds.fossilized_left",
    }  # fmt: skip
    assert set(epoch_packet(training(), Averages(), EPOCH, wall_ns=1).training_metrics) == known


@pytest.mark.parametrize(
    ("slots", "stages", "limits", "free", "left"),
    [
        ((), [], SeedLimits(4, 8), 0, 8),
        (("a", "b"), [], SeedLimits(4, 8), 2, 8),
        (("a", "b"), [SEED_STAGE_TRAINING], SeedLimits(4, 8), 1, 8),
        (("a", "b"), [SEED_STAGE_FOSSILIZED], SeedLimits(4, 1), 2, 0),
        (("a", "b"), [SEED_STAGE_FOSSILIZED] * 3, SeedLimits(4, 1), 2, 0),
        (("a", "b"), [], SeedLimits(0, 8), 0, 8),
    ],
)
def test_the_packet_says_where_the_model_can_grow(
    slots: tuple[str, ...], stages: list[Any], limits: SeedLimits, free: int, left: int
) -> None:
    """Free slots, and seeds that may still become a part of the host; no free slot if seeds are disabled."""
    status = training()
    status.slots, status.seed_limits = slots, limits
    status.grafted = [SeedState(seed_id=f"s{n}", stage=stage, slot="a") for n, stage in enumerate(stages)]
    metrics = epoch_packet(status, Averages(), EPOCH, wall_ns=1).training_metrics
    assert (metrics["seeds.slots_free"], metrics["seeds.fossilized_left"]) == (free, left)


def test_a_desired_seed_that_the_model_refuses_is_not_shown() -> None:
    """Only what grows is shown as growing, and a seed in the model stays whatever is refused about it."""
    status = training()
    status.desired = [SeedState(seed_id=seed_id, stage=SEED_STAGE_TRAINING) for seed_id in ("in", "out", "wanted")]
    status.grafted = [SeedState(seed_id="in", stage=SEED_STAGE_GERMINATED)]
    status.refusals = (("in", "has to wait"), ("out", "no slot is free"))
    assert [(seed.seed_id, seed.stage) for seed in status.seeds] == [
        ("in", SEED_STAGE_GERMINATED),
        ("wanted", SEED_STAGE_TRAINING),
    ]


def test_a_status_before_the_first_epoch_is_json() -> None:
    """NaN never reaches operators: unknown figures are 0."""
    status = status_message(fresh(), now_s=12.0)
    assert "NaN" not in MessageToJson(status)
    assert (status.training_loss, status.validation_accuracy, status.uptime_s) == (0.0, 0.0, 2.0)


def test_quantiles_are_nearest_rank() -> None:
    """p50 and p99 are values that occurred."""
    made = training()
    made.boundaries_ms.extend(range(1, 101))
    status = status_message(made, now_s=12.0)
    assert (status.boundary_ms_p50, status.boundary_ms_p99, status.last_boundary_ms) == (50, 99, 100)


@pytest.mark.parametrize(("lasts", "shown"), [(None, 0), (7, 107), (2**64 - 1, 2**64 - 1), (10**38, 2**64 - 1)])
def test_an_adjustment_may_outlast_the_steps_of_the_contract(lasts: int | None, shown: int) -> None:
    """An expiry beyond the contract's last step is shown as that step: operators still get their status."""
    made = training()
    change = Adjustment(
        group=None, factor=0.5, expires_after_steps=lasts, origin="operator", request_id="1", reason="calm"
    )
    made.adjustments = (ActiveAdjustment(change, at_step=100),)
    (adjustment,) = status_message(made, now_s=1.0).adjustments
    assert adjustment.expires_at_step == shown


def test_skipped_steps_do_not_enter_the_mean_loss() -> None:
    """A NaN step counts in number and time, not in the loss."""
    made = training()
    made.sums.add(StepDone(30, 2, math.nan, math.nan, 8, 0.1, 0.0, 50.0, skipped=True))
    assert made.sums.loss == 2.0
    assert status_message(made, now_s=1.0).epoch_step == 3


def step(loss: float, *, skipped: bool = False) -> StepDone:
    """Returns a step of 8 samples in 0.25 s, of which 0.125 s were spent waiting for input."""
    return StepDone(1, 1, loss, loss / 2, 8, duration_s=0.25, input_wait_s=0.125, finished_at_s=0.0, skipped=skipped)


def test_sums_are_over_finite_steps_and_times_over_all() -> None:
    """A skipped step changes neither the loss nor the norm."""
    sums = EpochSums()
    for one in (step(2.0), step(4.0), step(math.nan, skipped=True)):
        sums.add(one)
    assert (sums.steps, sums.skipped_steps, sums.samples) == (2, 1, 24)
    assert (sums.loss, sums.gradient_norm) == (3.0, 2.0)
    assert (sums.duration_s, sums.input_wait_s, sums.samples_per_s) == (0.75, 0.375, 32.0)


def test_before_the_first_step_there_is_no_loss_and_no_throughput() -> None:
    """There is no division by zero."""
    assert math.isnan(EpochSums().loss)
    assert EpochSums().samples_per_s == 0.0


def test_a_restored_place_has_its_own_sums() -> None:
    """Counts and losses are those of the restored place."""
    run = training()
    progress = EpochProgress(1, over=False, batches=4, steps=3, skipped_steps=1, samples=32, loss_sum=6.0)
    run.rewind(
        Restored(Position(3, 1), "a", "a", 1.0, progress, seeds=(), learning_rates={"host": 0.5}, adjustments=())
    )
    sums = run.sums
    assert (run.epoch, run.global_step, run.learning_rates) == (1, 3, {"host": 0.5})
    assert (sums.steps, sums.skipped_steps, sums.samples, sums.loss) == (3, 1, 32, 2.0)


def test_a_new_epoch_starts_its_sums() -> None:
    """The epoch is set, and nothing is counted yet."""
    run = fresh()
    run.sums.add(step(2.0))
    run.begin_epoch(2)
    assert (run.epoch, run.sums) == (2, EpochSums())


def test_seeds_are_shown_as_grafted_or_else_as_desired() -> None:
    """Each once: in the order desired, then those in the model that are no longer desired."""
    run = fresh()
    run.desired = [SeedState(seed_id=name, stage=SEED_STAGE_GERMINATED) for name in ("a", "b")]
    run.grafted = [SeedState(seed_id=name, stage=SEED_STAGE_TRAINING) for name in ("c", "b")]
    assert [(seed.seed_id, seed.stage) for seed in run.seeds] == [
        ("a", SEED_STAGE_GERMINATED),
        ("b", SEED_STAGE_TRAINING),
        ("c", SEED_STAGE_TRAINING),
    ]


def test_validation_is_that_of_the_last_epoch() -> None:
    """Not a number before there is one."""
    run = fresh()
    assert math.isnan(run.validation_accuracy)
    assert math.isnan(run.validation_loss)
    run.last_epoch = EpochDone(
        1, 8, Evaluation(4.0, 6, 8), 1.0, 0.0, learning_rates={}, momentum=0.0, hardware=HardwareContext()
    )
    assert (run.validation_accuracy, run.validation_loss) == (0.75, 0.5)


SOUND = Conditions(EMERGENCY_LEVEL_UNSPECIFIED, "", (), (), "", 0)


@pytest.mark.parametrize(
    ("state", "conditions", "health", "words"),
    [
        (RUN_STATE_RUNNING, SOUND, HEALTH_STATUS_HEALTHY, [""]),
        (RUN_STATE_PAUSED, SOUND, HEALTH_STATUS_HEALTHY, [""]),
        (RUN_STATE_RUNNING, replace(SOUND, skipped_streak=2), HEALTH_STATUS_DEGRADED, ["2 steps were skipped"]),
        (RUN_STATE_RUNNING, replace(SOUND, checkpoints_failing="ENOSPC"), HEALTH_STATUS_DEGRADED, ["ENOSPC"]),
        (RUN_STATE_PAUSED, replace(SOUND, checkpoints_failing="ENOSPC"), HEALTH_STATUS_DEGRADED, ["ENOSPC"]),
        (RUN_STATE_RUNNING, replace(SOUND, open_breakers=("tamiyo",)), HEALTH_STATUS_DEGRADED, ["tamiyo"]),
        (RUN_STATE_RUNNING, replace(SOUND, conservative_reasons=("operator",)), HEALTH_STATUS_DEGRADED, ["operator"]),
        (
            RUN_STATE_RUNNING,
            replace(SOUND, emergency_level=EMERGENCY_LEVEL_NOTICE, emergency_reason="over budget"),
            HEALTH_STATUS_HEALTHY,
            [""],
        ),
        (
            RUN_STATE_RUNNING,
            Conditions(EMERGENCY_LEVEL_ELEVATED, "breaker_open: tamiyo", ("breaker_open:tamiyo",), ("tamiyo",), "", 0),
            HEALTH_STATUS_DEGRADED,
            ["elevated: breaker_open: tamiyo", "breakers not closed: tamiyo", "conservative mode is on"],
        ),
        (
            RUN_STATE_HALTED,
            Conditions(EMERGENCY_LEVEL_HALT, "smoke", ("operator",), (), "", 0),
            HEALTH_STATUS_CRITICAL,
            ["halted: smoke", "tolaria emergency clear", "then resume"],
        ),
        (RUN_STATE_HALTED, SOUND, HEALTH_STATUS_UNHEALTHY, ["why"]),
        (RUN_STATE_FAILED, SOUND, HEALTH_STATUS_UNHEALTHY, ["why"]),
    ],
)
def test_health_is_the_worst_condition_and_says_why(
    state: RunState.ValueType, conditions: Conditions, health: HealthStatus.ValueType, words: list[str]
) -> None:
    """A run that does not train when it should is never healthy; whatever slows it down makes it degraded."""
    run = fresh()
    run.state, run.state_reason = state, "why"
    found = health_of(run, conditions)
    assert found.status == health
    assert [word for word in words if word not in found.summary] == []
    assert bool(found.summary) is (health != HEALTH_STATUS_HEALTHY)


def test_rollbacks_count_by_origin() -> None:
    """And the status has the figures of health checks, restore points and the lane's phase."""
    run = training()
    run.best_step, run.skipped_steps = 3, 1
    for origin in ("health", "tamiyo", "operator"):
        run.rolled_back(origin)
    run.newest_proven_step, run.attempt, run.lane_phase = 0, 2, lambda: ("evaluating", 45.0)
    status = status_message(run, now_s=12.0)
    assert (status.best_step, status.skipped_steps, status.attempt, status.rollbacks) == (3, 1, 2, 3)
    assert dict(status.rollbacks_by_origin) == {"health": 1, "tamiyo": 1, "operator": 1}
    assert (status.phase, status.phase_s) == ("evaluating", 45.0)
    assert status.HasField("newest_proven_step")
    assert not status_message(fresh(), now_s=12.0).HasField("newest_proven_step")


def test_changed_seeds_keep_what_was_measured_of_them() -> None:
    """A change between two epochs has the new stage and alpha, and the last epoch's norm, rate and merge metrics."""
    status = fresh()
    status.grafted = [
        SeedState(seed_id="s", gradient_norm=0.5, learning_rate=0.1, metrics={"weight": 0.3, "alpha": 0.3}),
        SeedState(seed_id="gone"),
    ]
    status.regraft([SeedState(seed_id="s", metrics={"alpha": 1.0}), SeedState(seed_id="new")])
    assert status.grafted == [
        SeedState(seed_id="s", gradient_norm=0.5, learning_rate=0.1, metrics={"weight": 0.3, "alpha": 1.0}),
        SeedState(seed_id="new"),
    ]


def test_figures_of_a_gpu_are_in_the_packet() -> None:
    """Its memory and use, and the copies to it for each step; without a GPU they are 0."""
    gpu = HardwareContext(device_type="cuda", total_memory_gb=80, available_memory_gb=30, utilization_percent=90)
    status = training()
    status.sums.add(StepDone(31, 2, 1.0, 0.5, 8, 0.1, 0.05, 50.0, copy_s=0.03))
    metrics = epoch_packet(status, Averages(), replace(EPOCH, hardware=gpu), wall_ns=1).training_metrics
    figures = [metrics[f"gpu_{name}"] for name in ("mem_used_gb", "mem_free_gb", "util_percent")]
    assert figures == [50, 30, 90]
    assert metrics["h2d_copy_ms"] == pytest.approx(10)
    assert 0 <= metrics["cpu_util_percent"] <= 100
    without = epoch_packet(training(), Averages(), EPOCH, wall_ns=1).training_metrics
    assert [without[f"gpu_{name}"] for name in ("mem_used_gb", "mem_free_gb", "util_percent")] == [0, 0, 0]


@pytest.mark.parametrize(("epochs", "steps", "left_s"), [(5, 0, 0.1 * 38 + 4.0 * 3.8), (0, 40, 0.1 * 10 + 4.0)])
def test_the_time_that_is_left_follows_from_the_pace(epochs: int, steps: int, left_s: float) -> None:
    """Steps and evaluations that are left, of ten steps each; only while the run trains, and once some are known."""
    made = RunStatus("run", "digits", "exp", epochs=epochs, started_at_s=10.0, steps=steps)
    made.steps_per_epoch, made.state = 10, RUN_STATE_RUNNING
    made.begin_epoch(2)
    assert made.remaining_s is None
    for number in range(2):
        made.step(StepDone(29 + number, 2, 1.0, 0.5, 8, 0.1, 0.0, 46.0))
    assert made.remaining_s is None
    for _ in range(6):
        made.pace.step(StepDone(30, 2, 1.0, 0.5, 8, 0.1, 0.0, 46.0))
    made.epoch_done(EPOCH)
    assert made.remaining_s == pytest.approx(left_s)
    made.state = RUN_STATE_PAUSED
    assert made.remaining_s is None


def test_what_follows_an_epoch_is_part_of_the_time_that_is_left() -> None:
    """The boundary and a checkpoint too, once a step has followed them; one pause of a run does not count."""
    pace = Pace()
    for number in range(1, 5):
        after_s = 100.0 * number
        for place in range(10):
            pace.step(StepDone(10 * number + place, number, 1.0, 0.5, 8, 0.1, 0.0, after_s + 0.1 * place + 0.1))
        pace.epoch(replace(EPOCH, finished_at_s=after_s + 3.0))
        if number == 1:
            assert pace.remaining_s(10, 2) == pytest.approx(10 * 0.1 + 2 * 2.0)
    pace.step(StepDone(50, 5, 1.0, 0.5, 8, 0.1, 0.0, 5000.1))
    assert pace.remaining_s(10, 2) == pytest.approx(10 * 0.1 + 2 * 99.0)


def test_the_packet_of_an_epoch_without_an_evaluation_knows_no_loss() -> None:
    """NaN, which is no plateau; of several sets all figures are in it."""
    unevaluated = replace(EPOCH, evaluation=Evaluation(0.0))
    assert math.isnan(epoch_packet(training(), Averages(), unevaluated, wall_ns=1).validation_loss)
    sets = Evaluation.of_sets({"near": Evaluation(8.0, 3, 4), "far": Evaluation(12.0, samples=4)})
    metrics = epoch_packet(training(), Averages(), replace(EPOCH, evaluation=sets), wall_ns=1).training_metrics
    assert (metrics["validation.near/accuracy"], metrics["validation.far/loss"]) == (0.75, 3.0)
    assert "validation.far/accuracy" not in metrics


def test_before_the_first_step_of_an_epoch_the_throughput_is_that_of_the_last_one() -> None:
    """Tiny epochs are between two epochs whenever they are looked at."""
    status = training()
    status.epoch_done(replace(EPOCH, samples=60))
    status.begin_epoch(3)
    assert status_message(status, now_s=20.0).samples_per_s == pytest.approx(40.0)
    status.sums.add(StepDone(31, 3, 1.0, 0.5, 8, 0.1, 0.05, 50.0))
    assert status_message(status, now_s=20.0).samples_per_s == pytest.approx(80.0)
    assert status_message(fresh(), now_s=20.0).samples_per_s == 0


def test_a_draining_service_is_shown_before_the_run_has_ended() -> None:
    """At once, while the last step is still computed; a run that has ended stays what it is."""
    status = training()
    status.state, status.draining = RUN_STATE_RUNNING, "SIGTERM"
    assert status_message(status, now_s=20.0).state == RUN_STATE_DRAINING
    status.state = RUN_STATE_FAILED
    assert status_message(status, now_s=20.0).state == RUN_STATE_FAILED
