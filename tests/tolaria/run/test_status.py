from __future__ import annotations

import math

import pytest
from google.protobuf.json_format import MessageToJson

from leyline.v1.state_pb2 import HardwareContext
from tolaria.jobs import Evaluation
from tolaria.training.packet import state_packet, status_message
from tolaria.training.progress import Progress
from tolaria.training.reports import EpochReport, StepReport
from tolaria.values.optimization import ActiveAdjustment, Adjustment

EPOCH = EpochReport(
    2, 30, Evaluation(8.0, 3, 4), 1.5, 0.1, 50.0, {"host": 0.01}, 0.9, HardwareContext(device_type="cpu"), 2.0
)


def progress() -> Progress:
    """A run in the middle of training."""
    made = Progress("run", "digits", "exp", 5, 15, started_at_s=10.0)
    made.begin_epoch(2)
    for loss in (1.0, 3.0):
        made.sums.add(StepReport(30, 2, loss, 0.5, 8, 0.1, 0.05, 50.0))
    return made


def test_the_packet_tells_the_state_of_the_run() -> None:
    """Fields and metric keys of the contract are filled from the epoch."""
    packet = state_packet(progress(), EPOCH, wall_ns=123)
    assert (packet.version, packet.current_epoch, packet.global_step, packet.timestamp_ns) == (1, 2, 30, 123)
    assert (packet.training_loss, packet.validation_loss, packet.validation_accuracy) == (2.0, 2.0, 0.75)
    assert (packet.training_run_id, packet.experiment_name, packet.source_subsystem) == ("run", "exp", "tolaria")
    metrics = packet.training_metrics
    assert metrics["samples_per_s"] == 80
    assert metrics["latency_ms"] == 1500
    assert metrics["optimizer_lr"] == pytest.approx(0.01)
    assert metrics["input_wait_ms"] == pytest.approx(50)
    assert packet.packet_id != state_packet(progress(), EPOCH, wall_ns=123).packet_id


def test_the_keys_are_the_contracts() -> None:
    """No key is sent that the contract does not list."""
    known = {
        "loss", "accuracy", "gradient_norm", "samples_per_s", "latency_ms", "loss_delta", "loss_ewma",
        "loss_volatility", "grad_norm_ewma", "grad_var", "grad_conflict_rate", "optimizer_lr", "optimizer_momentum",
        "input_wait_ms", "h2d_copy_ms", "tamiyo_latency_ms", "kasmina.apply_ms",
        "kasmina.finalize_ms", "step_latency_ms",
        "hook_latency_ms", "gpu_mem_used_gb", "gpu_mem_free_gb", "gpu_util_percent", "cpu_util_percent",
    }  # fmt: skip
    assert set(state_packet(progress(), EPOCH, wall_ns=1).training_metrics) <= known


def test_a_status_before_the_first_epoch_is_json() -> None:
    """NaN never reaches operators: what is not known yet is 0."""
    status = status_message(Progress("run", "digits", "exp", 5, 15, started_at_s=10.0), now_s=12.0)
    assert "NaN" not in MessageToJson(status)
    assert (status.training_loss, status.validation_accuracy, status.uptime_s) == (0.0, 0.0, 2.0)


def test_quantiles_are_nearest_rank() -> None:
    """p50 and p99 are values that occurred."""
    made = progress()
    made.boundaries_ms.extend(range(1, 101))
    status = status_message(made, now_s=12.0)
    assert (status.boundary_ms_p50, status.boundary_ms_p99, status.last_boundary_ms) == (50, 99, 100)


@pytest.mark.parametrize(("lasts", "told"), [(None, 0), (7, 107), (2**64 - 1, 2**64 - 1), (10**38, 2**64 - 1)])
def test_a_change_may_outlast_the_steps_that_can_be_told(lasts: int | None, told: int) -> None:
    """What expires beyond the contract's last step is told as expiring there: operators still get their status."""
    made = progress()
    change = Adjustment(
        group=None, factor=0.5, expires_after_steps=lasts, origin="operator", request_id="1", reason="calm"
    )
    made.adjustments = (ActiveAdjustment(change, at_step=100),)
    (adjustment,) = status_message(made, now_s=1.0).adjustments
    assert adjustment.expires_at_step == told


def test_void_steps_do_not_spoil_the_mean_loss() -> None:
    """A NaN step counts in number and time, not in the loss."""
    made = progress()
    made.sums.add(StepReport(30, 2, math.nan, math.nan, 8, 0.1, 0.0, 50.0, void=True))
    assert made.sums.loss == 2.0
    assert status_message(made, now_s=1.0).epoch_step == 3
