"""Makes the state packet for the controller and the status for operators from `Progress`. Changes nothing."""

from __future__ import annotations

import math
import uuid

from leyline.v1.admin_service_pb2 import RUN_STATE_FAILED, GetStatusResponse, LearningRateAdjustment
from leyline.v1.enums_pb2 import HEALTH_STATUS_DEGRADED, HEALTH_STATUS_HEALTHY, HEALTH_STATUS_UNHEALTHY
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.telemetry_pb2 import SystemHealth
from tolaria import __version__
from tolaria.training.progress import Progress
from tolaria.training.reports import EpochReport, StepReport
from tolaria.values.optimization import ActiveAdjustment

PACKET_VERSION = 1
# The last step that the contract can tell. An adjustment may be asked to last for longer.
_STEP_MAX = 2**64 - 1


def state_packet(progress: Progress, epoch: EpochReport, *, wall_ns: int) -> SystemStatePacket:
    """The packet for the boundary after `epoch`. `wall_ns` is Unix time."""
    return SystemStatePacket(
        version=PACKET_VERSION,
        current_epoch=epoch.epoch,
        validation_accuracy=epoch.evaluation.accuracy,
        validation_loss=epoch.evaluation.loss,
        timestamp_ns=wall_ns,
        hardware_context=epoch.hardware,
        training_metrics=_training_metrics(progress, epoch),
        seed_states=progress.grafted,
        packet_id=uuid.uuid4().hex,
        global_step=epoch.global_step,
        training_loss=epoch.training_loss,
        source_subsystem="tolaria",
        training_run_id=progress.run_id,
        experiment_name=progress.experiment,
    )


def step_packet(progress: Progress, step: StepReport, *, wall_ns: int) -> SystemStatePacket:
    """The packet between epochs, after `step`: the last validation's figures, this step's own loss."""
    sums, health = progress.sums, progress.health
    return SystemStatePacket(
        version=PACKET_VERSION,
        current_epoch=step.epoch,
        validation_accuracy=_known(progress.validation_accuracy),
        validation_loss=_known(progress.validation_loss),
        timestamp_ns=wall_ns,
        training_metrics={
            "loss": step.loss,
            "gradient_norm": step.gradient_norm,
            "samples_per_s": sums.samples_per_s,
            "loss_delta": health.loss_delta,
            "loss_ewma": health.loss_ewma,
            "loss_volatility": math.sqrt(health.loss_variance),
            "grad_norm_ewma": health.gradient_norm_ewma,
            "grad_var": health.gradient_norm_variance,
            "step_latency_ms": step.duration_s * 1000,
        },
        seed_states=progress.grafted,
        packet_id=uuid.uuid4().hex,
        global_step=step.global_step,
        training_loss=step.loss,
        source_subsystem="tolaria",
        training_run_id=progress.run_id,
        experiment_name=progress.experiment,
    )


def _training_metrics(progress: Progress, epoch: EpochReport) -> dict[str, float]:
    sums, health = progress.sums, progress.health
    steps = max(1, sums.steps + sums.void_steps)
    return {
        "loss": epoch.training_loss,
        "accuracy": epoch.evaluation.accuracy,
        "gradient_norm": sums.gradient_norm,
        "samples_per_s": sums.samples_per_s,
        "latency_ms": epoch.steps_s * 1000,
        "loss_delta": health.loss_delta,
        "loss_ewma": health.loss_ewma,
        "loss_volatility": math.sqrt(health.loss_variance),
        "grad_norm_ewma": health.gradient_norm_ewma,
        "grad_var": health.gradient_norm_variance,
        "grad_conflict_rate": progress.conflict_ratio,
        "optimizer_lr": epoch.learning_rate,
        "optimizer_momentum": epoch.momentum,
        "input_wait_ms": sums.input_wait_s * 1000 / steps,
        "step_latency_ms": sums.duration_s * 1000 / steps,
        "tamiyo_latency_ms": progress.tamiyo_latency_ms,
        "kasmina.apply_ms": progress.kasmina_latency_ms,
        "hook_latency_ms": progress.boundaries_ms[-1] if progress.boundaries_ms else 0.0,
        "cpu_util_percent": epoch.hardware.utilization_percent,
    }


def status_message(progress: Progress, *, now_s: float) -> GetStatusResponse:
    """The run's part of the answer to GetStatus; figures that do not exist yet are 0."""
    boundaries = sorted(progress.boundaries_ms)
    return GetStatusResponse(
        run_id=progress.run_id,
        state=progress.state,
        state_reason=progress.state_reason,
        job=progress.job,
        epoch=progress.epoch,
        epochs=progress.epochs,
        global_step=progress.global_step,
        epoch_step=progress.sums.steps + progress.sums.void_steps,
        steps_per_epoch=progress.steps_per_epoch,
        samples_total=progress.samples_total,
        samples_per_s=progress.sums.samples_per_s,
        training_loss=_known(progress.sums.loss if progress.sums.steps else progress.training_loss),
        validation_accuracy=_known(progress.validation_accuracy),
        validation_loss=_known(progress.validation_loss),
        seeds=progress.seeds,
        last_boundary_ms=progress.boundaries_ms[-1] if boundaries else 0.0,
        boundary_ms_p50=_quantile(boundaries, 0.50),
        boundary_ms_p99=_quantile(boundaries, 0.99),
        boundaries_over_budget=progress.boundaries_over_budget,
        last_command=progress.last_command,
        tamiyo_answer=progress.tamiyo_answer,
        kasmina_answer=progress.kasmina_answer,
        commands_accepted=progress.commands_accepted,
        commands_rejected=progress.commands_rejected,
        health=_health(progress),
        version=__version__,
        uptime_s=now_s - progress.started_at_s,
        learning_rates=progress.learning_rates,
        fast_paths=progress.fast_paths,
        adjustments=[_adjustment(live) for live in progress.adjustments],
    )


def _adjustment(live: ActiveAdjustment) -> LearningRateAdjustment:
    change = live.adjustment
    told = LearningRateAdjustment(
        group=change.group or "",
        origin=change.origin,
        request_id=change.request_id,
        reason=change.reason,
        from_step=live.at_step,
        expires_at_step=min(live.at_step + change.expires_after_steps, _STEP_MAX) if change.expires_after_steps else 0,
    )
    if change.factor is not None:
        told.factor = change.factor
    if change.value is not None:
        told.value = change.value
    return told


def _health(progress: Progress) -> SystemHealth:
    if progress.state == RUN_STATE_FAILED:
        return SystemHealth(status=HEALTH_STATUS_UNHEALTHY, summary=progress.state_reason)
    if progress.health.void_streak:
        return SystemHealth(status=HEALTH_STATUS_DEGRADED, summary="the last steps were not finite")
    return SystemHealth(status=HEALTH_STATUS_HEALTHY)


def _known(value: float) -> float:
    """0 for NaN: JSON has no NaN, and before the first epoch there is nothing to know."""
    return 0.0 if math.isnan(value) else value


def _quantile(ordered: list[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
