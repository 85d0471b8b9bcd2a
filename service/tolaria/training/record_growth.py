"""Writes what grows in a run into metrics and events: seeds, gradients by source, learning rates, rebuilds.

Takes no decisions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import structlog

from leyline.v1.enums_pb2 import SeedLifecycleStage
from leyline.v1.seeds_pb2 import SeedState
from tolaria.config import GradientsSettings
from tolaria.gradients import Alarm, AlarmKind, AlarmThresholds, SeedMetrics, SeedMetricSet, alarms
from tolaria.optimization import RebuildOutcome, RebuildResult, Violation
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics
from tolaria.training.growth import SeedsReport

_STAGES = [name.removeprefix("SEED_STAGE_").lower() for name in SeedLifecycleStage.keys()[1:]]


class GrowthRecorder:
    """The writer of everything about seeds, gradients and rates. Used on the event loop only."""

    def __init__(self, settings: GradientsSettings, metrics: Metrics, emitter: Emitter) -> None:
        self._compact = settings.compact
        self._thresholds = AlarmThresholds(settings.share_jump, settings.seed_conflict, settings.conflict)
        self._metrics = metrics
        self._emitter = emitter
        self._log = structlog.get_logger()
        metrics.lr_controller_enabled.set(1)

    def seeds(self, states: Sequence[SeedState]) -> None:
        """These are the seeds now."""
        stages = Counter(stage_name(state.stage) for state in states)
        for name in _STAGES:
            self._metrics.seeds_active.labels(name).set(stages[name])

    def fence(self, report: SeedsReport) -> None:
        """A fence has changed the model, or has refused to."""
        for change in report.changes:
            self._log.info("seed_changed", change=change, at_step=report.global_step)
        for seed_id, reason in report.refusals:
            self._log.info("seed_refused", seed_id=seed_id, reason=reason, at_step=report.global_step)
        if report.rebuild is not None:
            self._rebuild(report.global_step, report.rebuild)
        if report.rebuild_error:
            self._metrics.opt_rebuild_failures_total.inc()
            self._emitter.emit(events.OPT_REBUILD_FAILED, step=report.global_step, detail=report.rebuild_error)

    def rates(self, rates: Mapping[str, float]) -> None:
        """These are the learning rates now, all of them."""
        self._metrics.lr_controller_current_lr.clear()
        for group, rate in rates.items():
            self._metrics.lr_controller_current_lr.labels(group).set(rate)

    def adjusted(self, origin: str, before: Mapping[str, float], after: Mapping[str, float], reason: str) -> None:
        """Somebody has changed learning rates."""
        self._metrics.lr_controller_adjustments_total.labels(origin).inc()
        self._log.info("learning_rate_adjusted", origin=origin, reason=reason, before=dict(before), after=dict(after))

    def violations(self, violations: Sequence[Violation]) -> None:
        """Rates that somebody else wrote were found and put back."""
        for violation in violations:
            self._metrics.lr_controller_integrity_violations_total.labels(violation.group).inc()
            self._emitter.emit(
                events.LR_INTEGRITY_VIOLATION,
                group=violation.group,
                expected=violation.expected,
                found=violation.found,
            )

    def gradients(self, epoch: int, gathered: SeedMetricSet, *, layers: bool) -> None:
        """An epoch's rows have been merged; `layers`: show the norms of layers too."""
        metrics = self._metrics
        metrics.grad_agg_microbatches_total.inc(gathered.microbatches)
        metrics.grad_agg_conflicts.set(gathered.conflicts)
        metrics.grad_agg_weights_mean.set(gathered.weights_mean)
        metrics.grad_agg_pcgrad_applied.set(gathered.pcgrad_applied)
        metrics.grad_agg_conflict_ratio.set(gathered.conflict_ratio)
        metrics.grad_agg_pair_conflict_ratio.set(gathered.pair_conflict_ratio)
        metrics.grad_agg_teacher_share.set(gathered.teacher_share)
        self._forget_seeds()
        for source in gathered.sources:
            self._seed(source, layers=layers)
        for alarm in alarms(gathered, self._thresholds):
            self._raise(epoch, alarm)
        if self._compact:
            for seed in gathered.seeds:
                self._health(seed)

    def _forget_seeds(self) -> None:
        """A seed that is gone, or has another stage, must not stay on a dashboard."""
        metrics = self._metrics
        for gauge in (
            metrics.seed_weight, metrics.seed_norm, metrics.seed_share, metrics.seed_share_delta, metrics.seed_alpha,
            metrics.seed_conflicts, metrics.seed_conflict_ratio, metrics.seed_params, metrics.seed_mask_fraction,
            metrics.seed_teacher_share, metrics.seed_layer_norm,
        ):  # fmt: skip
            gauge.clear()

    def _seed(self, source: SeedMetrics, *, layers: bool) -> None:
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
        for layer, norm in source.layer_norms if layers else ():
            metrics.seed_layer_norm.labels(source.seed_id, layer).set(norm)

    def _raise(self, epoch: int, alarm: Alarm) -> None:
        match alarm.kind:
            case AlarmKind.CONFLICT:
                self._emitter.emit(events.GRAD_CONFLICT_HIGH, epoch=epoch, ratio=alarm.value, threshold=alarm.threshold)
            case AlarmKind.SEED_CONFLICT if not self._compact:
                self._emitter.emit(
                    events.SEED_CONFLICT_HIGH, seed_id=alarm.seed_id, ratio=alarm.value, threshold=alarm.threshold
                )
            case AlarmKind.SHARE_JUMP if not self._compact:
                self._emitter.emit(
                    events.SEED_SHARE_JUMP, seed_id=alarm.seed_id, delta=alarm.value, threshold=alarm.threshold
                )
            case _:
                pass  # compact: one seed_health event says it

    def _health(self, seed: SeedMetrics) -> None:
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
    """A stage as labels and people have it."""
    return SeedLifecycleStage.Name(stage).removeprefix("SEED_STAGE_").lower()
