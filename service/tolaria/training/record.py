"""Writes what happens in a run into its progress, its metrics and its events. Takes no decisions."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import structlog

from leyline.v1.admin_service_pb2 import RunState
from leyline.v1.enums_pb2 import CommandType
from leyline.v1.seeds_pb2 import SeedState
from tolaria.config import GradientsSettings
from tolaria.errors import CommandRejectedError
from tolaria.images.image import SnapshotStatistics
from tolaria.telemetry import events
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.logging import LogContext
from tolaria.telemetry.metrics import Metrics
from tolaria.training.consult import Consultation
from tolaria.training.fastpaths import FastPaths
from tolaria.training.fences import OptimizerChanged
from tolaria.training.growth import SeedsReport
from tolaria.training.judge import forgive, observe
from tolaria.training.place import EpochPlace
from tolaria.training.progress import Progress
from tolaria.training.record_growth import GrowthRecorder
from tolaria.training.record_rollback import RollbackRecorder
from tolaria.training.recovery.chronicle import Chronicle
from tolaria.training.recovery.keeper import Restored
from tolaria.training.reports import EpochReport, StepReport
from tolaria.training.rig import Rig
from tolaria.values.optimization import Adjustment

_STATES = [name.removeprefix("RUN_STATE_").lower() for name in RunState.keys()[1:]]


class Recorder:
    """The one writer of a run's progress and of the metrics that follow from it. Used on the event loop only."""

    def __init__(
        self,
        progress: Progress,
        *,
        gradients: GradientsSettings,
        metrics: Metrics,
        emitter: Emitter,
        log_context: LogContext,
        chronicle: Chronicle,
    ) -> None:
        self.progress = progress
        self._chronicle = chronicle
        self.rollbacks = RollbackRecorder(metrics, emitter)
        self._growth = GrowthRecorder(gradients, metrics, emitter)
        self._metrics = metrics
        self._emitter = emitter
        self._log_context = log_context
        self._log = structlog.get_logger()
        # Cached children: three times cheaper than labels() for every step.
        self._state_gauges = {name: metrics.training_state.labels(name) for name in _STATES}
        self._samples_told = 0
        self._step_told = 0
        log_context.run_id = progress.run_id

    def state(self, state: RunState.ValueType, reason: str) -> None:
        """The run is in another state."""
        self.progress.state, self.progress.state_reason = state, reason
        now = RunState.Name(state).removeprefix("RUN_STATE_").lower()
        for name, gauge in self._state_gauges.items():
            gauge.set(name == now)
        self._log.info("run_state", state=now, reason=reason)

    def resumed(self) -> None:
        """An operator lets the run go on."""
        self.progress.health = forgive(self.progress.health)

    def scale(self, scale: str) -> None:
        """What the run's health is measured against now."""
        self._chronicle.scale(scale)

    def epoch_begins(self, epoch: int) -> None:
        """`epoch` has been given to the lane."""
        self.progress.begin_epoch(epoch)
        self._log_context.epoch = epoch
        self._metrics.training_epoch.set(epoch)

    def begin(self, rig: Rig) -> None:
        """This is what will be trained, and from where on."""
        self.fast_paths(rig.paths)
        self.rates(rig.growth.controller.learning_rates())
        self._at(rig.epoch, rig.global_step)
        self._grafted(rig.growth.topology.states(rig.global_step))

    def step(self, step: StepReport, *, observed: bool) -> None:
        """One more step is done; one that is not `observed` has no part in the averages that others are judged by."""
        progress, metrics = self.progress, self._metrics
        if observed:
            progress.health = observe(progress.health, step)
        progress.sums.add(step)
        progress.global_step = step.global_step
        progress.samples_total += step.samples
        metrics.step_duration_seconds.observe(step.duration_s)
        metrics.step_input_wait_seconds.observe(step.input_wait_s)
        if step.violations:
            self._growth.violations(step.violations)
        if step.void and not step.rescaled:
            self._emitter.emit(
                events.NON_FINITE_STEP, step=step.global_step, loss=step.loss, gradient_norm=step.gradient_norm
            )

    def unhealthy(self, step: StepReport, reason: str) -> None:
        """A step, which is not void, has gone wrong."""
        if not step.void:
            self._emitter.emit(
                events.LOSS_EXPLOSION,
                step=step.global_step,
                loss=step.loss,
                gradient_norm=step.gradient_norm,
                reason=reason,
            )

    def rewound(self, restored: Restored) -> None:
        """The run has gone back to here."""
        progress = self.progress
        progress.health = forgive(progress.health)
        self._at(restored.place, restored.position.global_step)
        self._grafted(restored.seeds)
        self.rates(restored.learning_rates)
        progress.adjustments = restored.adjustments

    def frame_ends(self, snapshots: SnapshotStatistics) -> None:
        """A frame of reports has been read: what need not be told for each step is told once for all of them."""
        self.rollbacks.ring(snapshots)
        progress, metrics = self.progress, self._metrics
        self._log_context.step = progress.global_step
        metrics.training_step.set(progress.global_step)
        metrics.training_samples_total.inc(progress.samples_total - self._samples_told)
        self._samples_told = progress.samples_total
        if progress.global_step != self._step_told:
            metrics.training_last_step_timestamp_seconds.set(time.time())
        self._step_told = progress.global_step

    def epoch_ends(self, epoch: EpochReport, *, layers: bool) -> None:
        """The epoch's steps and evaluation are done; `layers` shows what costs a series for each layer."""
        progress, metrics = self.progress, self._metrics
        progress.last_epoch = epoch
        progress.training_loss = epoch.training_loss
        metrics.training_loss.set(epoch.training_loss)
        metrics.training_accuracy.set(epoch.evaluation.accuracy)
        metrics.training_latency_ms.set(epoch.steps_s * 1000)
        if epoch.samples == 0:
            self._emitter.emit(events.ZERO_SAMPLES, epoch=epoch.epoch)
        self._grafted(epoch.seeds)
        self.rates(epoch.learning_rates)
        progress.adjustments = epoch.adjustments
        if epoch.gradients is not None:
            progress.conflict_ratio = epoch.gradients.conflict_ratio
            self._growth.gradients(epoch.epoch, epoch.gradients, layers=layers)

    def boundary(self, epoch: EpochReport, held_up_s: float, budget_s: float, *, binding: bool) -> bool:
        """The boundary after `epoch` held training up so long; over a `binding` budget that is a breach, and told."""
        progress, metrics = self.progress, self._metrics
        held_up_ms = held_up_s * 1000
        progress.boundaries_ms.append(held_up_ms)
        metrics.epoch_hook_latency_ms.set(held_up_ms)
        metrics.epoch_hook_duration_seconds.observe(held_up_s)
        breach = binding and held_up_s > budget_s
        if breach:
            progress.boundaries_over_budget += 1
            self._emitter.emit(
                events.EPOCH_BUDGET_EXCEEDED, epoch=epoch.epoch, latency_ms=held_up_ms, budget_ms=budget_s * 1000
            )
        metrics.epochs_total.inc()
        self._log.info(
            "epoch_finished",
            loss=_round(epoch.training_loss),
            accuracy=_round(epoch.evaluation.accuracy),
            validation_loss=_round(epoch.evaluation.loss),
            steps=progress.sums.steps,
            samples_per_s=round(progress.sums.samples_per_s, 1),
            boundary_ms=round(held_up_ms, 2),
            tamiyo=progress.tamiyo_answer,
            kasmina=progress.kasmina_answer,
        )
        return breach

    def hook(self, step: int, latency_ms: float, budget_ms: float) -> bool:
        """Putting a question after `step` took so long; whether that was over the budget, which is told."""
        self._metrics.hook_latency_ms.set(latency_ms)
        breach = latency_ms > budget_ms
        if breach:
            self._emitter.emit(events.HOOK_BUDGET_EXCEEDED, step=step, latency_ms=latency_ms, budget_ms=budget_ms)
        return breach

    def consultation(self, settled: Consultation, *, stale: bool) -> None:
        """Both peers have answered, or have failed to. A `stale` answer changes nothing: its command is refused."""
        progress = self.progress
        late = " (too late, dropped)" if stale else ""
        progress.tamiyo_answer = settled.tamiyo_answer + late
        progress.kasmina_answer = settled.kasmina_answer + late
        progress.tamiyo_latency_ms = settled.tamiyo_latency_ms
        progress.kasmina_latency_ms = settled.kasmina_latency_ms
        if settled.rejection is not None:
            self._reject(settled.rejection)
        if stale and settled.command is not None:
            self._reject(CommandRejectedError("late", settled.command.command_id, "training has moved on too far"))

    def applied(self, settled: Consultation) -> None:
        """A command of the controller has taken effect."""
        command = settled.command
        if command is None:
            return
        self.progress.commands_accepted += 1
        self.progress.last_command = command
        kind = CommandType.Name(command.command_type).removeprefix("COMMAND_").lower()
        self._metrics.command_applied_total.labels(kind).inc()
        self._chronicle.applied(command)
        self._log.info(
            "command_applied",
            command_id=command.command_id,
            command=settled.tamiyo_answer,
            kasmina=settled.kasmina_answer,
            asked_at_step=settled.state.global_step,
        )

    def refused(self, rejection: CommandRejectedError) -> None:
        """A verified command could not be carried out; nothing has changed."""
        self.progress.tamiyo_answer = f"rejected: {rejection.detail}"
        self._reject(rejection)

    def _reject(self, rejection: CommandRejectedError) -> None:
        self.progress.commands_rejected += 1
        self._chronicle.rejected(rejection)
        self._metrics.command_rejected_total.labels(rejection.reason).inc()
        self._emitter.emit(
            events.COMMAND_REJECTED, command_id=rejection.command_id, reason=rejection.reason, detail=rejection.detail
        )

    def desired_seeds(self, seeds: list[SeedState]) -> None:
        """Kasmina desires these."""
        self.progress.desired = seeds

    def fence(self, report: SeedsReport, *, wished: bool) -> None:
        """A fence has changed the seeds in the model, or has refused to; `wished`: because Kasmina asked."""
        if wished:
            self.progress.refusals = report.refusals
        self._grafted(report.states)
        self._growth.fence(report)

    def fast_paths(self, paths: FastPaths) -> None:
        """These fast paths run; one that was asked for by name and does not is an event."""
        metrics, running = self._metrics, paths.running
        metrics.train_compile_enabled.set("compile" in running)
        metrics.train_amp_enabled.set("amp" in running)
        metrics.train_tf32_enabled.set("tf32" in running)
        metrics.train_foreach_enabled.set("fused" in running)
        metrics.train_pin_memory.set("pin_memory" in running)
        self.progress.fast_paths = paths.told
        for path in paths.failed:
            self._emitter.emit(events.COMPILE_FALLBACK, path=path, detail=paths.fallbacks[path])

    def wishes_failed(self, reason: str) -> None:
        """Nothing of what Kasmina desires could be done; she is told so for each seed."""
        self.progress.refusals = tuple((seed.seed_id, reason) for seed in self.progress.desired)
        self._log.error("seeds_failed", reason=reason)

    def rates(self, rates: Mapping[str, float]) -> None:
        """These are the learning rates now."""
        self.progress.learning_rates = dict(rates)
        self._growth.rates(rates)

    def adjusted(self, adjustment: Adjustment, changed: OptimizerChanged) -> None:
        """Somebody has changed learning rates."""
        self.rates({**self.progress.learning_rates, **changed.after})
        self.progress.adjustments = changed.living
        self._growth.adjusted(adjustment.origin, changed.before, changed.after, adjustment.reason)

    def _at(self, place: EpochPlace, global_step: int) -> None:
        self.progress.global_step = global_step
        self.progress.begin_epoch(place.number)
        self.progress.sums.take_over(place)
        self._log_context.epoch, self._log_context.step = place.number, global_step
        self._metrics.training_epoch.set(place.number)
        self._metrics.training_step.set(global_step)

    def _grafted(self, states: Sequence[SeedState]) -> None:
        self.progress.grafted = list(states)
        self._growth.seeds(self.progress.seeds)


def _round(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 5)
