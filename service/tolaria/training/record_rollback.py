"""Writes what becomes of rollbacks into metrics, events and the log. Takes no decisions."""

from __future__ import annotations

import structlog

from leyline.v1.enums_pb2 import RollbackTier
from tolaria.checkpoint.store import Damage
from tolaria.errors import (
    ImageDamagedError,
    LaneError,
    NoCheckpointError,
    RestoreAbandonedError,
    RestoreUnprovenError,
    StateMismatchError,
    TolariaError,
)
from tolaria.images.image import SnapshotStatistics
from tolaria.rollback.orders import Ending, RollbackOutcome, tier_word
from tolaria.telemetry import events
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.metrics import Metrics

# Where a rollback came to nothing, and why: the labels of its failure. The first that fits counts.
FAILURES: tuple[tuple[type[TolariaError], tuple[str, str]], ...] = (
    (NoCheckpointError, ("locate", "no_point")),
    (RestoreAbandonedError, ("restore", "deadline")),
    (RestoreUnprovenError, ("verify", "unproven")),
    (ImageDamagedError, ("verify", "damaged")),
    (StateMismatchError, ("stage", "mismatch")),
    (LaneError, ("restore", "lane_ended")),
    (TolariaError, ("restore", "error")),
)


class RollbackRecorder:
    """Used on the event loop only."""

    def __init__(self, metrics: Metrics, emitter: Emitter) -> None:
        self._metrics = metrics
        self._emitter = emitter
        self._log = structlog.get_logger()
        self._told = SnapshotStatistics(0, 0, 0, 0, 0, 0, 0, 0)
        metrics.rollback_fast_size_bytes.set(0)

    def ended(self, outcome: RollbackOutcome, reason: str) -> None:
        """A rollback has ended, in whichever way; how long it took is told apart for those that restored."""
        metrics, tier = self._metrics, tier_word(outcome.tier)
        if outcome.unrecorded is not None:
            self._log.error(
                "rollback_not_in_the_journal", rollback_id=outcome.rollback_id, error=str(outcome.unrecorded)
            )
        if outcome.ending is Ending.RESTORED:
            metrics.rollback_restore_latency_ms.set(outcome.restore_ms)
            self._emitter.emit(
                events.ROLLBACK_COMPLETED,
                rollback_id=outcome.rollback_id,
                tier=tier,
                restored_step=outcome.restored_step,
                latency_ms=outcome.latency_ms,
                coordinated="yes" if outcome.coordinated else "uncoordinated",
                reason=reason,
            )
            return
        stage, cause = failure_of(outcome)
        metrics.rollback_failures_total.labels(stage, cause).inc()
        self.lasted(outcome.tier, outcome.ending.value, outcome.latency_ms / 1000)
        if outcome.ending is Ending.DEADLINE_EXCEEDED:
            metrics.rollback_deadline_exceeded_total.inc()
            self._emitter.emit(
                events.ROLLBACK_DEADLINE_EXCEEDED,
                rollback_id=outcome.rollback_id,
                tier=tier,
                latency_ms=outcome.latency_ms,
            )
        self._emitter.emit(
            events.ROLLBACK_RESTORE_FAILED,
            rollback_id=outcome.rollback_id,
            tier=tier,
            stage=stage,
            reason=str(outcome.error or outcome.ending.value),
        )

    def lasted(self, tier: RollbackTier.ValueType, outcome: str, duration_s: float) -> None:
        """From the trigger to the first good step, or to the end of one that restored nothing."""
        self._metrics.rollback_duration_seconds.labels(tier_word(tier), outcome).observe(duration_s)

    def damaged(self, rollback_id: str, damage: Damage) -> None:
        """A checkpoint could not be loaded; the next older one is tried."""
        self._emitter.emit(
            events.ROLLBACK_RESTORE_FAILED,
            rollback_id=rollback_id,
            tier="full",
            stage=damage.stage,
            reason=f"checkpoint {damage.checkpoint_id}: {damage.reason}",
        )

    def points_lost(self, reason: str) -> None:
        """No more snapshots can be taken."""
        self._log.warning("no_fast_rollback", reason=reason)

    def ring(self, now: SnapshotStatistics) -> None:
        """The ring as it is now; what it has counted since the last time is added."""
        metrics, before = self._metrics, self._told
        metrics.rollback_fast_size_bytes.set(now.size_bytes)
        metrics.rollback_fast_hits_total.inc(now.hits - before.hits)
        metrics.rollback_fast_misses_total.inc(now.misses - before.misses)
        metrics.rollback_snapshots_total.inc(now.snapshots - before.snapshots)
        self._told = now


def failure_of(outcome: RollbackOutcome) -> tuple[str, str]:
    """Stage and cause of a rollback that restored nothing, as the metric's labels have them."""
    if outcome.ending is Ending.ABORTED:
        return "restore", "aborted"
    error = outcome.error
    return next((labels for kind, labels in FAILURES if isinstance(error, kind)), ("restore", "error"))
