from __future__ import annotations

import math

import pytest
from google.protobuf.json_format import MessageToJson

from leyline.v1.enums_pb2 import SEED_STAGE_GERMINATED, SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import HardwareContext
from tolaria.lane.messages import EpochDone, Restored, StepDone
from tolaria.run.status import EpochSums, RunStatus, epoch_packet, status_message
from tolaria.values.loss_window import Averages
from tolaria.values.optimization import ActiveAdjustment, Adjustment
from tolaria.values.training import EpochProgress, Evaluation, Position

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
    """No key is sent that the contract does not list."""
    known = {
        "loss", "accuracy", "gradient_norm", "samples_per_s", "latency_ms", "loss_delta", "loss_ewma",
        "loss_volatility", "grad_norm_ewma", "grad_var", "grad_conflict_rate", "optimizer_lr", "optimizer_momentum",
        "input_wait_ms", "h2d_copy_ms", "tamiyo_latency_ms", "kasmina.apply_ms",
        "kasmina.finalize_ms", "step_latency_ms",
        "hook_latency_ms", "gpu_mem_used_gb", "gpu_mem_free_gb", "gpu_util_percent", "cpu_util_percent",
    }  # fmt: skip
    assert set(epoch_packet(training(), Averages(), EPOCH, wall_ns=1).training_metrics) <= known


def test_a_status_before_the_first_epoch_is_json() -> None:
    """NaN never reaches operators: unknown figures are 0."""
    status = status_message(fresh(), skipped_streak=0, now_s=12.0)
    assert "NaN" not in MessageToJson(status)
    assert (status.training_loss, status.validation_accuracy, status.uptime_s) == (0.0, 0.0, 2.0)


def test_quantiles_are_nearest_rank() -> None:
    """p50 and p99 are values that occurred."""
    made = training()
    made.boundaries_ms.extend(range(1, 101))
    status = status_message(made, skipped_streak=0, now_s=12.0)
    assert (status.boundary_ms_p50, status.boundary_ms_p99, status.last_boundary_ms) == (50, 99, 100)


@pytest.mark.parametrize(("lasts", "shown"), [(None, 0), (7, 107), (2**64 - 1, 2**64 - 1), (10**38, 2**64 - 1)])
def test_an_adjustment_may_outlast_the_steps_of_the_contract(lasts: int | None, shown: int) -> None:
    """An expiry beyond the contract's last step is shown as that step: operators still get their status."""
    made = training()
    change = Adjustment(
        group=None, factor=0.5, expires_after_steps=lasts, origin="operator", request_id="1", reason="calm"
    )
    made.adjustments = (ActiveAdjustment(change, at_step=100),)
    (adjustment,) = status_message(made, skipped_streak=0, now_s=1.0).adjustments
    assert adjustment.expires_at_step == shown


def test_skipped_steps_do_not_enter_the_mean_loss() -> None:
    """A NaN step counts in number and time, not in the loss."""
    made = training()
    made.sums.add(StepDone(30, 2, math.nan, math.nan, 8, 0.1, 0.0, 50.0, skipped=True))
    assert made.sums.loss == 2.0
    assert status_message(made, skipped_streak=0, now_s=1.0).epoch_step == 3


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
