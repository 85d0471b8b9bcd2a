"""Metrics, events and log lines of breakers, conservative mode, emergencies, rollbacks, checkpoints and profiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Final, assert_never

import structlog

from leyline.v1 import enums_pb2 as enums
from tolaria import emergency, errors
from tolaria.checkpoint.store import Damage
from tolaria.emergency.protocol import CRITICAL_LEVELS, HOW_TO_GO_ON, SENTINEL, level_name
from tolaria.images import SnapshotStatistics
from tolaria.journal.rows import CheckpointRow
from tolaria.lane.messages import LaneLost, TraceFailed, TraceWritten
from tolaria.resilience.conservative import ModeChange
from tolaria.rollback.protocol import ORIGINS, Ending, Rollback, tier_name
from tolaria.run.observers import RunObserver
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics, start_at_zero

_NS_PER_MS: Final = 1_000_000

FAILURES: Final[tuple[tuple[type[errors.TolariaError], tuple[str, str]], ...]] = (
    (errors.NoCheckpointError, ("locate", "no_point")),
    (errors.RestoreAbandonedError, ("restore", "deadline")),
    (errors.RestoreUnprovenError, ("verify", "unproven")),
    (errors.ImageDamagedError, ("verify", "damaged")),
    (errors.StateMismatchError, ("stage", "mismatch")),
    (errors.LaneError, ("restore", "lane_ended")),
    (errors.TolariaError, ("restore", "error")),
)
"""Labels (stage, reason) of a failed rollback by its error; the first matching class applies."""

_ABORTED: Final = ("restore", "aborted")


class SafetyTelemetry(RunObserver):
    """Writes the telemetry of a run's safety mechanisms. `degraded`: the signal board is polled for lack of a futex.

    `reasons` are the names of all reasons for conservative mode.

    `newest_checkpoint_ns` is the Unix time of the newest committed checkpoint of an earlier process; None without one.
    """

    def __init__(
        self,
        metrics: Metrics,
        emitter: Emitter,
        breakers: tuple[str, ...],
        *,
        degraded: bool,
        newest_checkpoint_ns: int | None = None,
        reasons: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._emitter = emitter
        self._log = structlog.get_logger()
        self._snapshots = SnapshotStatistics(0, 0, 0, 0, 0, 0, 0, 0)
        metrics.mode_conservative.set(0)
        for name in reasons:
            metrics.mode_conservative_reasons.labels(name).set(0)
        for name in breakers:
            metrics.breaker_state.labels(name).set(enums.CIRCUIT_STATE_CLOSED)
        metrics.emergency_shared_signal_degraded.set(degraded)
        metrics.emergency_bypass_dropped_total.inc(0)
        self._clock = clock
        age_s = 0.0 if newest_checkpoint_ns is None else max(0.0, time.time() - newest_checkpoint_ns / 1e9)
        self._checkpointed_s = clock() - age_s
        metrics.checkpoint_age_seconds.set_function(lambda: self._clock() - self._checkpointed_s)
        outcomes = [ending.value for ending in Ending]
        start_at_zero(metrics.rollback_requests_total, product(ORIGINS, outcomes))
        start_at_zero(metrics.rollback_duration_seconds, product(("fast", "full"), outcomes))
        start_at_zero(metrics.rollback_failures_total, (_ABORTED, *(labels for _, labels in FAILURES)))
        metrics.rollback_fast_size_bytes.set(0)
        metrics.profiler_enabled.set(0)
        self._level(enums.EMERGENCY_LEVEL_UNSPECIFIED)

    # -- breakers and conservative mode ------------------------------------------------------------------------------

    def on_breaker(self, name: str, state: enums.CircuitBreakerState.ValueType) -> None:
        self._metrics.breaker_state.labels(name).set(state)
        if state == enums.CIRCUIT_STATE_OPEN:
            self._emitter.emit(events.BREAKER_OPENED, breaker=name)
        elif state == enums.CIRCUIT_STATE_CLOSED:
            self._emitter.emit(events.BREAKER_CLOSED, breaker=name)

    def on_mode(self, change: ModeChange) -> None:
        for name in change.entered:
            self._metrics.mode_conservative_reasons.labels(name).set(1)
        for name in change.left:
            self._metrics.mode_conservative_reasons.labels(name).set(0)
        self._metrics.mode_conservative.set(change.on)
        if change.on and not change.was_on:
            self._emitter.emit(events.CONSERVATIVE_MODE_ENTERED, reasons=", ".join(change.reasons))
        elif change.was_on and not change.on:
            self._emitter.emit(events.CONSERVATIVE_MODE_CLEARED, reasons=", ".join(change.left))

    def on_epoch_failed(self) -> None:
        self._metrics.epochs_failed.inc()

    # -- emergencies -------------------------------------------------------------------------------------------------

    def broadcast(self, notice: emergency.Notice) -> None:
        """Passes an emergency signal to telemetry, before anything that queues."""
        signal = notice.signal
        self._emitter.emit(
            events.EMERGENCY_BROADCASTS[signal.level],
            self._bypass_delivered if signal.level in CRITICAL_LEVELS else None,
            emergency_level=level_name(signal.level),
            reason=signal.reason,
            origin=signal.origin,
            count=notice.count,
        )

    def on_emergency(self, report: emergency.Report) -> None:
        match report:
            case emergency.Escalated():
                self._escalated(report)
            case emergency.Cleared():
                self._cleared(report)
            case emergency.Broadcast():
                self._broadcast_done(report)
            case emergency.HeldBack():
                self._log.warning("emergency_told_later", reason=report.notice.signal.reason)
            case emergency.Covered():
                level = level_name(report.signal.level)
                self._log.info("emergency_covered", emergency_level=level, reason=report.signal.reason)
            case emergency.Acknowledgement():
                latency_ms = round(report.latency_ns / _NS_PER_MS, 3)
                self._log.info("emergency_acknowledged", by=report.participant, latency_ms=latency_ms)
            case emergency.DeadlineMissed():
                self._log.warning("emergency_deadline_missed", missing=report.state.missing)
            case emergency.Reissued():
                self._log.warning("emergency_put_on_the_board_again", error=report.board_error)
            case emergency.BoardUnreadable():
                self._log.error("signal_board_unreadable", error=report.error)
            case _:
                assert_never(report)

    def _escalated(self, report: emergency.Escalated) -> None:
        state = report.state
        self._level(state.level)
        level, reason, origin = level_name(state.level), state.reason, state.origin
        self._emitter.emit(events.EMERGENCY_ESCALATED, emergency_level=level, reason=reason, origin=origin)
        if state.level == enums.EMERGENCY_LEVEL_HALT:
            self._metrics.emergency_halts_total.inc()
            self._emitter.emit(events.EMERGENCY_HALT, reason=reason, origin=origin)
            self._log.warning(
                "training_halted", detail=f"the process stays up, also with service.exit_when_done: {HOW_TO_GO_ON}"
            )
        if origin == SENTINEL:
            self._emitter.emit(events.HEARTBEAT_LOST, reason=reason)
        if report.board_error:
            self._log.error("signal_board_not_written", error=report.board_error)

    def _cleared(self, report: emergency.Cleared) -> None:
        self._level(enums.EMERGENCY_LEVEL_UNSPECIFIED)
        if report.board_error:
            self._log.error("signal_board_not_written", error=report.board_error)
        self._emitter.emit(
            events.EMERGENCY_CLEARED,
            emergency_level=level_name(report.before.level),
            by=report.by.name.lower(),
            reason=report.reason,
            origin=report.origin,
        )

    def _broadcast_done(self, report: emergency.Broadcast) -> None:
        metrics, reason = self._metrics, report.notice.signal.reason
        if report.error:
            metrics.emergency_broadcast_failures_total.inc()
            self._emitter.emit(events.EMERGENCY_BROADCAST_FAILED, reason=reason, detail=report.error)
            return
        metrics.emergency_broadcasts_total.inc()
        metrics.emergency_last_broadcast_latency_ms.set(report.latency_ns / _NS_PER_MS)

    def _bypass_delivered(self) -> None:
        """Counts a critical broadcast that is out of this process. Called from any thread."""
        self._metrics.emergency_bypass_applied_total.inc()

    def _level(self, level: enums.EmergencyLevel.ValueType) -> None:
        self._metrics.emergency_level.set(level)
        self._metrics.emergency_halt.set(level == enums.EMERGENCY_LEVEL_HALT)

    # -- rollbacks and checkpoints -----------------------------------------------------------------------------------

    def on_snapshots(self, statistics: SnapshotStatistics) -> None:
        metrics, before = self._metrics, self._snapshots
        metrics.rollback_fast_size_bytes.set(statistics.size_bytes)
        metrics.rollback_fast_hits_total.inc(statistics.hits - before.hits)
        metrics.rollback_fast_misses_total.inc(statistics.misses - before.misses)
        metrics.rollback_snapshots_total.inc(statistics.snapshots - before.snapshots)
        self._snapshots = statistics

    def on_lane_lost(self, lost: LaneLost, step: int) -> None:  # noqa: ARG002 - the hook's signature
        self._snapshots = SnapshotStatistics(0, 0, 0, 0, 0, 0, 0, 0)  # the next process counts from 0

    def on_snapshots_unavailable(self, reason: str) -> None:
        if reason:
            self._log.warning("no_fast_rollback", reason=reason)
        else:
            self._log.info("fast_rollback_available")

    def on_rollback_started(self, rollback: Rollback) -> None:
        rollback_id, origin = rollback.rollback_id, rollback.origin
        self._log.warning("rolling_back", rollback_id=rollback_id, origin=origin, reason=rollback.reason)

    def on_rollback_ended(self, rollback: Rollback) -> None:
        outcome = (rollback.ending or Ending.FAILED).value
        self._metrics.rollback_requests_total.labels(rollback.origin, outcome).inc()
        if (error := rollback.unrecorded) is not None:
            self._log.error("rollback_not_in_the_journal", rollback_id=rollback.rollback_id, error=str(error))
        if rollback.left_not_kept:
            self._log.warning("left_state_not_kept", step=rollback.left_step, reason=rollback.left_not_kept)
        if rollback.ending is Ending.RESTORED:
            self._metrics.rollback_restore_latency_ms.set(rollback.restore_ms)
            self._emitter.emit(
                events.ROLLBACK_COMPLETED,
                rollback_id=rollback.rollback_id,
                tier=tier_name(rollback.tier),
                restored_step=rollback.restored_step,
                latency_ms=rollback.latency_ms,
                coordinated="yes" if rollback.coordinated else "uncoordinated",
                reason=rollback.reason,
            )
        else:
            self._rollback_failed(rollback)

    def _rollback_failed(self, rollback: Rollback) -> None:
        metrics, rollback_id, tier = self._metrics, rollback.rollback_id, tier_name(rollback.tier)
        ending, latency_ms = rollback.ending or Ending.FAILED, rollback.latency_ms
        stage, cause = failure_labels(rollback)
        metrics.rollback_failures_total.labels(stage, cause).inc()
        self.on_rollback_duration(rollback.tier, ending.value, latency_ms / 1000)
        if ending is Ending.DEADLINE_EXCEEDED:
            metrics.rollback_deadline_exceeded_total.inc()
            self._emitter.emit(
                events.ROLLBACK_DEADLINE_EXCEEDED, rollback_id=rollback_id, tier=tier, latency_ms=latency_ms
            )
        self._restore_failed(rollback_id, tier, stage, str(rollback.error or ending.value))

    def on_rollback_duration(self, tier: enums.RollbackTier.ValueType, outcome: str, duration_s: float) -> None:
        self._metrics.rollback_duration_seconds.labels(tier_name(tier), outcome).observe(duration_s)

    def on_rollback_recovered(self, rollback: Rollback, duration_s: float, step: int) -> None:
        self.on_rollback_duration(rollback.tier, (rollback.ending or Ending.FAILED).value, duration_s)
        self._log.info("training_again", step=step, after_ms=round(duration_s * 1000, 3))

    def on_checkpoint_damaged(self, rollback_id: str, damage: Damage) -> None:
        reason = f"checkpoint {damage.checkpoint_id}: {damage.reason}"
        self._restore_failed(rollback_id, "full", damage.stage, reason)

    def _restore_failed(self, rollback_id: str, tier: str, stage: str, reason: str) -> None:
        self._emitter.emit(
            events.ROLLBACK_RESTORE_FAILED, rollback_id=rollback_id, tier=tier, stage=stage, reason=reason
        )

    def on_checkpoint_written(self, row: CheckpointRow, duration_s: float) -> None:
        self._metrics.checkpoint_duration_seconds.observe(duration_s)
        self._metrics.checkpoint_size_bytes.set(row.size_bytes)
        self._checkpointed_s = self._clock()
        self._log.info("checkpoint_written", step=row.global_step, checkpoint_id=row.checkpoint_id)

    def on_checkpoint_failed(self, step: int, stage: str, reason: str) -> None:
        self._metrics.checkpoint_failures_total.inc()
        self._emitter.emit(events.CHECKPOINT_FAILED, step=step, stage=stage, reason=reason)

    def on_checkpoint_stalled(self, step: int, stalled_s: float) -> None:
        self._log.error("checkpoint_stalled", step=step, stalled_s=stalled_s)

    # -- profiles ----------------------------------------------------------------------------------------------------

    def on_profile_started(self, steps: int) -> None:
        self._metrics.profiler_enabled.set(1)
        self._log.info("profile_begun", steps=steps)

    def on_profile_ended(self, outcome: TraceWritten | TraceFailed) -> None:
        metrics = self._metrics
        metrics.profiler_enabled.set(0)
        if isinstance(outcome, TraceFailed):
            metrics.profiler_traces_failed_total.inc()
            self._emitter.emit(events.PROFILER_EXPORT_FAILED, stage=outcome.stage, reason=outcome.reason)
            return
        metrics.profiler_traces_emitted_total.inc()
        self._log.info(
            "profile_written",
            path=outcome.path,
            size_bytes=outcome.size_bytes,
            steps=outcome.steps,
            export_ms=round(outcome.export_s * 1000, 1),
            removed=outcome.removed,
        )

    def on_profile_abandoned(self) -> None:
        self._metrics.profiler_enabled.set(0)
        self._log.info("profile_abandoned", reason="the run has ended")


def failure_labels(rollback: Rollback) -> tuple[str, str]:
    """Returns stage and reason of a rollback that restored nothing, as the labels of its metric."""
    if rollback.ending is Ending.ABORTED:
        return _ABORTED
    return next((labels for kind, labels in FAILURES if isinstance(rollback.error, kind)), ("restore", "error"))
