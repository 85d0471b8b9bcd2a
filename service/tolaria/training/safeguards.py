"""Breakers and conservative mode of a run: what has failed, what is therefore left alone, and when it is tried again.

Owns which failure counts where, and its metrics and events. Must not know how peers are called or what an emergency is.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from leyline.v1.admin_service_pb2 import GetStatusResponse
from leyline.v1.enums_pb2 import (
    CIRCUIT_STATE_CLOSED,
    CIRCUIT_STATE_OPEN,
    HEALTH_STATUS_DEGRADED,
    HEALTH_STATUS_HEALTHY,
    CircuitBreakerState,
)
from tolaria.resilience.breaker import Breaker
from tolaria.resilience.conservative import ConservativeMode, ModeChange, breaker_open, epoch_failed
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics
from tolaria.training.growth import SeedsReport
from tolaria.training.reports import StepReport

TAMIYO, KASMINA = "tamiyo", "kasmina"
BOUNDARY, LR_INTEGRITY, OPTIMIZER, CHECKPOINT = "boundary", "lr_integrity", "optimizer", "checkpoint"
BREAKERS = (TAMIYO, KASMINA, BOUNDARY, LR_INTEGRITY, OPTIMIZER, CHECKPOINT)

# Causes of a failed epoch, as the reasons for conservative mode name them.
BREACH, PEER_FAILURE, NON_FINITE, BREAKER_OPENED = "boundary_breach", "peer_failure", "non_finite", "breaker_open"
EXPLOSION, COLLAPSE = "loss_explosion", "accuracy_collapse"


class Safeguards:
    """All breakers of a run, and its conservative mode. Used on the event loop only.

    Args:
        recovery_epochs: healthy epochs in a row after which a failed one is forgiven.
        metrics: of both.
        emitter: for their events.
        changed: called after something has changed that a status shows.
        opened: told the name of each breaker that opens, everything else having been done.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        recovery_epochs: int,
        metrics: Metrics,
        emitter: Emitter,
        changed: Callable[[], None],
        opened: Callable[[str], None] = lambda _name: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._emitter = emitter
        self._changed = changed
        self._opened = opened
        self.mode = ConservativeMode(recovery_epochs=recovery_epochs, on_change=self._mode_changed)
        self.breakers = {name: Breaker(name, clock=clock, on_change=self._breaker_changed) for name in BREAKERS}
        self._causes: set[str] = set()
        self._failed: set[str] = set()
        """Breakers that have taken a failure in this epoch; those of the lane succeed by epochs without one."""
        metrics.mode_conservative.set(0)
        for name in BREAKERS:
            metrics.breaker_state.labels(name).set(CIRCUIT_STATE_CLOSED)

    @property
    def all_closed(self) -> bool:
        """Whether no breaker is open or on trial."""
        return all(breaker.state == CIRCUIT_STATE_CLOSED for breaker in self.breakers.values())

    def permits(self, peer: str) -> bool:
        """Whether a peer may be asked now."""
        return self.mode.permits_call(peer, self.breakers[peer].state)

    def tell(self, status: GetStatusResponse) -> None:
        """Add reasons and breakers to a status; a healthy run with a breaker that is not closed is degraded."""
        status.conservative_reasons.extend(self.mode.reasons)
        for name, breaker in self.breakers.items():
            status.breakers[name] = breaker.state
        not_closed = [name for name, state in status.breakers.items() if state != CIRCUIT_STATE_CLOSED]
        if status.health.status == HEALTH_STATUS_HEALTHY and (not_closed or self.mode.on):
            status.health.status = HEALTH_STATUS_DEGRADED
            status.health.summary = (
                f"breakers not closed: {', '.join(sorted(not_closed))}" if not_closed else "conservative mode is on"
            )

    def force(self, name: str, state: CircuitBreakerState.ValueType) -> None:
        """Open or close a breaker by order. Raises KeyError for an unknown name, ValueError for any other state."""
        self.breakers[name].force(state)

    def step(self, step: StepReport) -> None:
        """One more step is done."""
        if step.violations:
            self._fail(LR_INTEGRITY)
        if step.void and not step.rescaled:
            self.failing(NON_FINITE)

    def rebuilt(self, report: SeedsReport) -> None:
        """A fence may have rebuilt the optimizer, or have failed to."""
        if report.rebuild_error:
            self._fail(OPTIMIZER)

    def failing(self, cause: str) -> None:
        """The epoch that goes on counts as failed; the mode is on from now."""
        self._causes.add(cause)
        self.mode.enter(epoch_failed(cause))

    def mended(self) -> None:
        """The run has gone back behind what had gone wrong with its steps: that is no failure of the epoch any more.

        How often it may do so has a budget of its own; the mode stays on until enough epochs have been healthy.
        """
        self._causes -= {NON_FINITE, EXPLOSION}

    def epoch_over(self, *, breach: bool) -> bool:
        """An epoch and its boundary are over, which may have been a `breach` of its budget; whether all went well.

        A peer's failure that shows later counts in the epoch that goes on by then.
        """
        if breach:
            self.failing(BREACH)
        healthy = not self._causes
        self._causes = set()
        self._count(BOUNDARY, healthy=healthy)
        for name in (LR_INTEGRITY, OPTIMIZER):
            if name not in self._failed:
                self._count(name, healthy=True)
        self._failed = set()
        if healthy:
            self.mode.healthy_epoch()
        else:
            self._metrics.epochs_failed.inc()
            self.mode.failed_epoch()
        return healthy

    def _fail(self, name: str) -> None:
        self._failed.add(name)
        self._count(name, healthy=False)

    def _count(self, name: str, *, healthy: bool) -> None:
        breaker = self.breakers[name]
        if not breaker.allows():
            return  # open, and not for long enough yet
        if healthy:
            breaker.succeeded()
        else:
            breaker.failed()

    def _breaker_changed(self, name: str, state: CircuitBreakerState.ValueType) -> None:
        self._metrics.breaker_state.labels(name).set(state)
        reason = breaker_open(name)
        if state == CIRCUIT_STATE_OPEN:
            self._emitter.emit(events.BREAKER_OPENED, breaker=name)
            if name != BOUNDARY:  # which counts failed epochs: its own opening is not one more
                self._causes.add(BREAKER_OPENED)
            self.mode.enter(reason)
            self._opened(name)
        elif state == CIRCUIT_STATE_CLOSED:
            self._emitter.emit(events.BREAKER_CLOSED, breaker=name)
            if reason.name in self.mode.reasons:
                self.mode.leave(reason)
        self._changed()

    def _mode_changed(self, change: ModeChange) -> None:
        for name in change.entered:
            self._metrics.mode_conservative_reasons.labels(name).set(1)
        for name in change.left:
            self._metrics.mode_conservative_reasons.labels(name).set(0)
        self._metrics.mode_conservative.set(change.on)
        if change.on and not change.was_on:
            self._emitter.emit(events.CONSERVATIVE_MODE_ENTERED, reasons=", ".join(change.reasons))
        elif change.was_on and not change.on:
            self._emitter.emit(events.CONSERVATIVE_MODE_CLEARED, reasons=", ".join(change.left))
        self._changed()
