"""Metrics, events and log lines of seeds, gradients by source, learning rates and optimizer rebuilds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import structlog

from leyline.v1.enums_pb2 import SeedLifecycleStage
from leyline.v1.seeds_pb2 import SeedState
from tolaria.config import GradientsSettings
from tolaria.lane.messages import EpochDone, OptimizerChanged, SeedsChanged, StepDone
from tolaria.run.observers import RunObserver
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics, start_at_zero
from tolaria.values.gradients import AlarmKind, SeedMetrics, SeedMetricSet, alarms
from tolaria.values.optimization import RATES_ARE_OWNED, Adjustment, RebuildOutcome, RebuildResult

_STAGES = [name.removeprefix("SEED_STAGE_").lower() for name in SeedLifecycleStage.keys()[1:]]


class SeedTelemetry(RunObserver):
    """Writes the metrics, events and log lines of seeds, gradients and learning rates."""

    def __init__(self, settings: GradientsSettings, metrics: Metrics, emitter: Emitter) -> None:
        self.settings = settings
        self._metrics = metrics
        self._emitter = emitter
        self._log = structlog.get_logger()
        self._violated: set[str] = set()
        metrics.lr_controller_enabled.set(1)
        start_at_zero(metrics.lr_controller_adjustments_total, [("operator",), ("tamiyo",), ("rollback",)])

    def on_seeds(self, states: Sequence[SeedState]) -> None:
        stages = Counter(stage_name(state.stage) for state in states)
        for name in _STAGES:
            self._metrics.seeds_active.labels(name).set(stages[name])

    def on_seeds_changed(self, change: SeedsChanged) -> None:
        for sentence in change.changes:
            self._log.info("seed_changed", change=sentence, at_step=change.global_step)
        for seed_id, reason in change.refusals:
            self._log.info("seed_refused", seed_id=seed_id, reason=reason, at_step=change.global_step)
        if change.rebuild is not None:
            self._rebuild(change.global_step, change.rebuild)
        if change.rebuild_error:
            self._metrics.opt_rebuild_failures_total.inc()
            self._emitter.emit(events.OPT_REBUILD_FAILED, step=change.global_step, detail=change.rebuild_error)

    def on_seeds_failed(self, reason: str) -> None:
        self._log.error("seeds_failed", reason=reason)

    def on_learning_rates(self, rates: dict[str, float]) -> None:
        self._metrics.lr_controller_current_lr.clear()
        start_at_zero(self._metrics.lr_controller_integrity_violations_total, ((group,) for group in rates))
        for group, rate in rates.items():
            self._metrics.lr_controller_current_lr.labels(group).set(rate)

    def on_adjusted(self, adjustment: Adjustment, change: OptimizerChanged) -> None:
        self._metrics.lr_controller_adjustments_total.labels(adjustment.origin).inc()
        self._log.info(
            "learning_rate_adjusted",
            origin=adjustment.origin,
            reason=adjustment.reason,
            before=dict(change.before),
            after=dict(change.after),
        )
        if change.limits:
            self._emitter.emit(events.LR_LIMITED, origin=adjustment.origin, detail="; ".join(change.limits))

    def on_step(self, step: StepDone) -> None:
        for violation in step.violations:
            self._metrics.lr_controller_integrity_violations_total.labels(violation.group).inc()
            if violation.group in self._violated:  # a scheduler does it at every step
                continue
            self._violated.add(violation.group)
            self._emitter.emit(
                events.LR_INTEGRITY_VIOLATION,
                group=violation.group,
                expected=violation.expected,
                found=violation.found,
                detail=RATES_ARE_OWNED,
            )

    def on_epoch(self, epoch: EpochDone, *, show_layers: bool) -> None:
        if (scheduled := epoch.scheduled) is not None:
            self._log.info(
                "learning_rate_scheduled",
                origin=scheduled.schedule,
                reason=scheduled.cause,
                before=dict(scheduled.before),
                after=dict(scheduled.after),
            )
        if (gathered := epoch.gradients) is None:
            return
        metrics = self._metrics
        metrics.grad_agg_microbatches_total.inc(gathered.microbatches)
        metrics.grad_agg_conflicts.set(gathered.conflicts)
        metrics.grad_agg_weights_mean.set(gathered.weights_mean)
        metrics.grad_agg_pcgrad_applied.set(gathered.pcgrad_applied)
        metrics.grad_agg_conflict_ratio.set(gathered.conflict_ratio)
        metrics.grad_agg_pair_conflict_ratio.set(gathered.pair_conflict_ratio)
        metrics.grad_agg_teacher_share.set(gathered.teacher_share)
        self._clear_seed_series()
        for source in gathered.sources:
            self._source(source, show_layers=show_layers)
        self._emit(epoch.epoch, gathered)

    def _clear_seed_series(self) -> None:
        """Removes the series of seeds that are gone or have changed their stage."""
        metrics = self._metrics
        for gauge in (
            metrics.seed_weight, metrics.seed_norm, metrics.seed_share, metrics.seed_share_delta, metrics.seed_alpha,
            metrics.seed_conflicts, metrics.seed_conflict_ratio, metrics.seed_params, metrics.seed_mask_fraction,
            metrics.seed_teacher_share, metrics.seed_layer_norm,
        ):  # fmt: skip
            gauge.clear()

    def _source(self, source: SeedMetrics, *, show_layers: bool) -> None:
        metrics, labels = self._metrics, (source.seed_id, stage_name(source.stage))
        metrics.seed_weight.labels(*labels).set(source.weight)
        metrics.seed_norm.labels(*labels).set(source.norm)
        metrics.seed_share.labels(*labels).set(source.share)
        metrics.seed_share_delta.labels(*labels).set(source.share_delta)
        metrics.seed_alpha.labels(*labels).set(source.alpha)
        metrics.seed_conflicts.labels(*labels).set(source.conflicts)
        metrics.seed_conflict_ratio.labels(*labels).set(source.conflict_ratio)
        metrics.seed_params.labels(*labels).set(source.params)
        metrics.seed_mask_fraction.labels(*labels).set(source.mask_fraction)
        metrics.seed_teacher_share.labels(*labels).set(source.teacher_share)
        for layer, norm in source.layer_norms if show_layers else ():
            metrics.seed_layer_norm.labels(source.seed_id, layer).set(norm)

    def _emit(self, epoch: int, gathered: SeedMetricSet) -> None:
        for alarm in alarms(gathered, self.settings):
            value, threshold, seed_id = alarm.value, alarm.threshold, alarm.seed_id
            if alarm.kind is AlarmKind.CONFLICT:
                self._emitter.emit(events.GRAD_CONFLICT_HIGH, epoch=epoch, ratio=value, threshold=threshold)
            elif self.settings.compact:
                pass  # SEED_HEALTH has the figures of all seeds
            elif alarm.kind is AlarmKind.SEED_CONFLICT:
                self._emitter.emit(events.SEED_CONFLICT_HIGH, seed_id=seed_id, ratio=value, threshold=threshold)
            else:
                self._emitter.emit(events.SEED_SHARE_JUMP, seed_id=seed_id, delta=value, threshold=threshold)
        for seed in gathered.seeds if self.settings.compact else ():
            self._emitter.emit(
                events.SEED_HEALTH,
                seed_id=seed.seed_id,
                share=seed.share,
                share_delta=seed.share_delta,
                conflict_ratio=seed.conflict_ratio,
                alpha=seed.alpha,
                norm=seed.norm,
            )

    def _rebuild(self, global_step: int, rebuild: RebuildResult) -> None:
        if rebuild.outcome is RebuildOutcome.SKIPPED:
            self._metrics.opt_rebuild_skipped_total.inc()
            return
        self._metrics.opt_rebuilds_total.inc()
        self._metrics.opt_rebuild_latency_ms.set(rebuild.latency_ms)
        self._emitter.emit(
            events.OPT_REBUILT,
            step=global_step,
            latency_ms=rebuild.latency_ms,
            kept=len(rebuild.kept) + len(rebuild.transformed),
            fresh=len(rebuild.fresh),
            dropped=len(rebuild.dropped),
        )


def stage_name(stage: SeedLifecycleStage.ValueType) -> str:
    """Returns the stage in lower case without its prefix, as labels show it."""
    return SeedLifecycleStage.Name(stage).removeprefix("SEED_STAGE_").lower()
