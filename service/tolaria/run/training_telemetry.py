"""Metrics, events and log lines of training: steps, epochs, boundaries, commands."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

import structlog

from leyline.v1.admin_service_pb2 import RunState
from leyline.v1.enums_pb2 import CommandType
from tolaria.errors import CommandRejectedError
from tolaria.lane.messages import EpochDone, LaneReady, RegimeBegun, Restored, StepDone
from tolaria.peers.consultation import Consultation
from tolaria.peers.verification import PAYLOADS, REJECTION_REASONS
from tolaria.run.observers import RunObserver
from tolaria.run.status import RunStatus, state_name
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.logging import LogContext
from tolaria.telemetry.metrics import Metrics, start_at_zero
from tolaria.values.optimization import AUTOMATIC, CONTROLLER, OPERATOR
from tolaria.values.training import BatchRange

_STATES = [name.removeprefix("RUN_STATE_").lower() for name in RunState.keys()[1:]]
_COMMANDS: Final = {kind: CommandType.Name(kind).removeprefix("COMMAND_").lower() for kind in PAYLOADS}
_REFUSALS: Final = ("late", "conservative", "refused", "unsupported", "malformed", "rollback_budget")
_ORIGINS: Final = (OPERATOR, CONTROLLER, AUTOMATIC)
_EPOCHS_COMPARED: Final = 16
_EPOCHS_NEEDED: Final = 3
_LATENCY_MORE_S: Final = 1.0
_RANGES_SHOWN: Final = 5
_LOSS, _GRADIENT, _EXTREME = "loss_not_finite", "gradient_not_finite", "loss_extreme"


class TrainingTelemetry(RunObserver):
    """Writes the metrics, events and log lines of training."""

    def __init__(
        self, metrics: Metrics, emitter: Emitter, log_context: LogContext, *, run_id: str, latency_factor: float
    ) -> None:
        self._metrics = metrics
        self._emitter = emitter
        self._context = log_context
        self._log = structlog.get_logger()
        # Cached children: three times cheaper than labels() for every step.
        self._state_gauges = {name: metrics.training_state.labels(name) for name in _STATES}
        self._latency_factor = latency_factor
        self._step_times_s: deque[float] = deque(maxlen=_EPOCHS_COMPARED)
        """Mean duration of a step in each of the last epochs."""
        self._samples = 0
        self._step = 0
        log_context.run_id = run_id
        for origin in _ORIGINS:
            metrics.lr_controller_factor.labels(origin).set(1.0)
        start_at_zero(metrics.training_skipped_steps_total, [(_LOSS,), (_GRADIENT,), (_EXTREME,)])
        start_at_zero(metrics.command_applied_total, ((name,) for name in _COMMANDS.values()))
        start_at_zero(metrics.command_rejected_total, ((name,) for name in (*REJECTION_REASONS, *_REFUSALS)))

    def on_ready(self, ready: LaneReady) -> None:
        metrics, running = self._metrics, ready.fast_paths_running
        metrics.train_compile_enabled.set("compile" in running)
        metrics.train_amp_enabled.set("amp" in running)
        metrics.train_tf32_enabled.set("tf32" in running)
        metrics.train_foreach_enabled.set("fused" in running)
        metrics.train_pin_memory.set("pin_memory" in running)
        for path, detail in ready.fast_path_failures:
            self._emitter.emit(events.COMPILE_FALLBACK, path=path, detail=detail)
        self._go_to(ready.progress.number, ready.position.global_step)

    def on_state(self, state: RunState.ValueType, reason: str) -> None:
        now = state_name(state)
        for name, gauge in self._state_gauges.items():
            gauge.set(name == now)
        self._log.info("run_state", state=now, reason=reason)

    def on_epoch_started(self, epoch: int) -> None:
        self._context.epoch = epoch
        self._metrics.training_epoch.set(epoch)

    def on_step(self, step: StepDone) -> None:
        self._metrics.step_duration_seconds.observe(step.duration_s)
        self._metrics.step_input_wait_seconds.observe(step.input_wait_s)
        if step.skipped and not step.rescaled:
            self._metrics.training_skipped_steps_total.labels(_skip_reason(step)).inc()
        if step.skipped and not step.rescaled and step.judged is None:
            self._emitter.emit(
                events.NON_FINITE_STEP, step=step.global_step, loss=step.loss, gradient_norm=step.gradient_norm
            )
        if step.left_out:
            self._metrics.training_skipped_microbatches_total.inc(len(step.left_out))
        if (step.skipped and not step.rescaled) or step.left_out:
            self._skipped(step)
        if step.parameters_finite is not None:
            self._emitter.emit(events.PARAMETERS_CHECKED, step=step.global_step, finite=step.parameters_finite)
        for seed_id in step.dropped_seeds:
            self._emitter.emit(events.SEED_GRADIENTS_DROPPED, step=step.global_step, seed_id=seed_id)

    def _skipped(self, step: StepDone) -> None:
        places = step.left_out or step.batches
        if step.left_out:
            reason = "a microbatch is not finite"
        elif step.judged is not None:
            reason = "the loss is far above all of the last ones"
        else:
            reason = f"the {'gradient' if math.isfinite(step.loss) else 'loss'} is not finite"
        self._emitter.emit(
            events.STEP_SKIPPED,
            step=step.global_step,
            epoch=step.epoch,
            batches=", ".join(map(str, places)),
            loss=step.loss,
            gradient_norm=step.gradient_norm,
            reason=reason,
        )

    def on_regime(self, regime: RegimeBegun) -> None:
        origin = "job" if regime.announced else "health"
        self._emitter.emit(events.LOSS_REGIME_ACCEPTED, step=regime.global_step, reason=regime.reason, origin=origin)

    def on_data_skipped(self, skip_id: str, ranges: Sequence[BatchRange], *, removed: bool) -> None:
        batches = "; ".join(f"epoch {each.epoch}: {each.first} to {each.last}" for each in ranges[:_RANGES_SHOWN])
        event = events.DATA_SKIP_REMOVED if removed else events.DATA_SKIPPED
        self._emitter.emit(event, skip_id=skip_id, batches=batches, count=sum(map(len, ranges)))

    def on_seed_culled(self, seed_id: str, step: int) -> None:
        reason = "its gradients were not finite in too many steps in a row"
        self._emitter.emit(events.SEED_CULLED, step=step, seed_id=seed_id, reason=reason)

    def on_explosion(self, step: StepDone, reason: str) -> None:
        self._emitter.emit(
            events.LOSS_EXPLOSION,
            step=step.global_step,
            loss=step.loss,
            gradient_norm=step.gradient_norm,
            reason=reason,
        )

    def on_frame(self, status: RunStatus) -> None:
        metrics = self._metrics
        for name, value in status.logged.items():
            metrics.training_metric.labels(name).set(value)
        self._context.step = status.global_step
        metrics.training_step.set(status.global_step)
        metrics.training_best_step.set(status.best_step)
        metrics.training_samples_total.inc(status.samples_total - self._samples)
        self._samples = status.samples_total
        if status.global_step != self._step:
            metrics.training_last_step_timestamp_seconds.set(time.time())
        self._step = status.global_step
        for origin, factor in _factors(status).items():
            metrics.lr_controller_factor.labels(origin).set(factor)

    def on_epoch(self, epoch: EpochDone, *, show_layers: bool) -> None:
        if epoch.compile_fallback:
            self._metrics.train_compile_enabled.set(0)
            self._emitter.emit(events.COMPILE_FALLBACK, path="compile", detail=epoch.compile_fallback)
        del show_layers
        metrics = self._metrics
        metrics.training_loss.set(epoch.training_loss)
        figures = epoch.evaluation.figures()
        metrics.training_accuracy.set(epoch.evaluation.accuracy)  # NaN if the job counts none
        metrics.validation_accuracy.set(epoch.evaluation.accuracy)
        metrics.validation_loss.set(epoch.evaluation.loss)
        for name, value in figures.items():
            metrics.validation_metric.labels(name).set(value)
        metrics.training_latency_ms.set(epoch.steps_s * 1000)
        if epoch.samples == 0:
            self._emitter.emit(events.ZERO_SAMPLES, epoch=epoch.epoch)
        if (right := epoch.evaluation.correct or 0) > (samples := epoch.evaluation.samples):
            self._emitter.emit(events.ACCURACY_ABOVE_ONE, epoch=epoch.epoch, correct=right, samples=samples)

    def on_metric_missing(self, setting: str, metric: str, known: Sequence[str]) -> None:
        self._emitter.emit(events.METRIC_MISSING, setting=setting, metric=metric, known=", ".join(known))

    def on_boundary(self, status: RunStatus, epoch: EpochDone, *, budget_ms: float, breach: bool) -> None:
        held_up_ms = status.boundaries_ms[-1]
        self._compare_latency(status, epoch)
        if held_up_ms > budget_ms:
            self._emitter.emit(
                events.EPOCH_HOOK_LATENCY_HIGH, epoch=epoch.epoch, latency_ms=held_up_ms, budget_ms=budget_ms
            )
        self._metrics.epoch_hook_latency_ms.set(held_up_ms)
        self._metrics.epoch_hook_duration_seconds.observe(held_up_ms / 1000)
        if breach:
            self._emitter.emit(
                events.EPOCH_BUDGET_EXCEEDED, epoch=epoch.epoch, latency_ms=held_up_ms, budget_ms=budget_ms
            )
        self._metrics.epochs_total.inc()
        self._log.info(
            "epoch_finished",
            loss=_rounded(epoch.training_loss),
            accuracy=_rounded(epoch.evaluation.accuracy),
            validation_loss=_rounded(epoch.evaluation.loss),
            steps=status.sums.steps,
            samples_per_s=round(status.sums.samples_per_s, 1),
            boundary_ms=round(held_up_ms, 2),
            tamiyo=status.tamiyo_answer,
            kasmina=status.kasmina_answer,
            **_own_metrics(epoch),
        )

    def _compare_latency(self, status: RunStatus, epoch: EpochDone) -> None:
        """Reports an epoch whose steps took far longer than those of the epochs before, and a second in all."""
        sums, before_s = status.sums, self._step_times_s
        if not (steps := sums.steps + sums.skipped_steps):
            return
        usual_s = statistics.median(before_s) * steps if len(before_s) >= _EPOCHS_NEEDED else math.inf
        if sums.duration_s > self._latency_factor * usual_s and sums.duration_s > usual_s + _LATENCY_MORE_S:
            self._emitter.emit(
                events.LATENCY_HIGH, epoch=epoch.epoch, latency_ms=sums.duration_s * 1000, usual_ms=usual_s * 1000
            )
        before_s.append(sums.duration_s / steps)

    def on_step_question(self, step: int, latency_ms: float, *, budget_ms: float, breach: bool) -> None:
        self._metrics.hook_latency_ms.set(latency_ms)
        if breach:
            self._emitter.emit(events.HOOK_BUDGET_EXCEEDED, step=step, latency_ms=latency_ms, budget_ms=budget_ms)

    def on_rewind(self, restored: Restored) -> None:
        self._go_to(restored.progress.number, restored.position.global_step)

    def on_command_applied(self, consultation: Consultation) -> None:
        if (command := consultation.command) is None:
            return
        self._metrics.command_applied_total.labels(_COMMANDS[command.command_type]).inc()
        self._log.info(
            "command_applied",
            command_id=command.command_id,
            command=consultation.tamiyo_answer,
            kasmina=consultation.kasmina_answer,
            asked_at_step=consultation.state.global_step,
        )

    def on_command_rejected(self, rejection: CommandRejectedError) -> None:
        self._metrics.command_rejected_total.labels(rejection.reason).inc()
        self._emitter.emit(
            events.COMMAND_REJECTED, command_id=rejection.command_id, reason=rejection.reason, detail=rejection.detail
        )

    def _go_to(self, epoch: int, global_step: int) -> None:
        self._context.epoch, self._context.step = epoch, global_step
        self._metrics.training_epoch.set(epoch)
        self._metrics.training_step.set(global_step)


def _factors(status: RunStatus) -> dict[str, float]:
    """Returns the product of the factors that each origin has in force, of automatic cuts the deepest, by group.

    The smallest over all groups counts. A factor on all groups is part of that of each.
    """
    factors = dict.fromkeys(_ORIGINS, 1.0)
    active = [each.adjustment for each in status.adjustments if not each.expired_at(status.global_step)]
    for origin in _ORIGINS if active else ():
        own = [(each.group, each.factor) for each in active if each.origin == origin and each.factor is not None]
        for group in {group for group, _ in own}:
            applied = [factor for other, factor in own if other in {None, group}]
            factors[origin] = min(factors[origin], min(applied) if origin == AUTOMATIC else math.prod(applied))
    return factors


def _own_metrics(epoch: EpochDone) -> dict[str, dict[str, float | None]]:
    """Returns the metrics of an evaluation that the job names, and those of its sets, for the log; else nothing."""
    evaluation = epoch.evaluation
    found = {name: ratio.value for name, ratio in evaluation.ratios().items()} | evaluation.set_figures()
    return {"metrics": {name: _rounded(value) for name, value in found.items()}} if found else {}


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 5)


def _skip_reason(step: StepDone) -> str:
    if step.judged is not None:
        return _EXTREME
    return _GRADIENT if math.isfinite(step.loss) else _LOSS
