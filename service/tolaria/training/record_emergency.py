"""Writes what happens to emergencies into metrics, events and the log. Takes no decisions."""

from __future__ import annotations

from typing import assert_never

import structlog

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT, EMERGENCY_LEVEL_UNSPECIFIED, EmergencyLevel
from tolaria.emergency import (
    Acknowledged,
    BoardUnreadable,
    Broadcast,
    Cleared,
    Covered,
    DeadlineMissed,
    Escalated,
    HeldBack,
    Notice,
    Reissued,
    Report,
)
from tolaria.emergency.protocol import SENTINEL
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics

_MS = 1_000_000


class EmergencyRecorder:
    """Tells of emergencies. Used on the event loop only.

    Args:
        metrics: of emergencies.
        emitter: for their events.
        degraded: whether waiting on the board polls, as the platform has no futex.
    """

    def __init__(self, metrics: Metrics, emitter: Emitter, *, degraded: bool) -> None:
        self._metrics = metrics
        self._emitter = emitter
        self._log = structlog.get_logger()
        metrics.emergency_shared_signal_degraded.set(degraded)
        metrics.emergency_bypass_dropped_total.inc(0)  # what waits is put together, never dropped: it stays at 0
        self._level(EMERGENCY_LEVEL_UNSPECIFIED)

    def broadcast(self, notice: Notice) -> None:
        """Hand a notice to telemetry, before anything that queues."""
        signal = notice.signal
        self._emitter.emit(
            events.EMERGENCY_BROADCAST,
            emergency_level=level_word(signal.level),
            reason=signal.reason,
            origin=signal.origin,
            count=notice.count,
        )

    def take(self, report: Report) -> None:
        """Tell of one report."""
        match report:
            case Escalated():
                self._escalated(report)
            case Cleared():
                self._cleared(report)
            case Broadcast():
                self._told(report)
            case HeldBack():
                self._log.warning("emergency_told_later", reason=report.notice.signal.reason)
            case Covered():
                self._log.info("emergency_covered", emergency_level=level_word(report.level), reason=report.reason)
            case Acknowledged():
                given = report.acknowledgement
                self._log.info(
                    "emergency_acknowledged", by=given.participant, latency_ms=round(given.latency_ns / _MS, 3)
                )
            case DeadlineMissed():
                self._log.warning("emergency_deadline_missed", missing=report.state.missing)
            case Reissued():
                self._log.warning("emergency_put_on_the_board_again", error=report.write.error)
            case BoardUnreadable():
                self._log.error("signal_board_unreadable", error=report.error)
            case _:
                assert_never(report)

    def _escalated(self, report: Escalated) -> None:
        state = report.state
        facts = {"emergency_level": level_word(state.level), "reason": state.reason, "origin": state.origin}
        self._level(state.level)
        self._emitter.emit(events.EMERGENCY_ESCALATED, **facts)
        if state.level == EMERGENCY_LEVEL_HALT:
            self._metrics.emergency_halts_total.inc()
            self._emitter.emit(events.EMERGENCY_HALT, reason=state.reason, origin=state.origin)
        if state.origin == SENTINEL:
            self._emitter.emit(events.HEARTBEAT_LOST, reason=state.reason)
        if report.write is not None and report.write.error:
            self._log.error("signal_board_not_written", error=report.write.error)

    def _cleared(self, report: Cleared) -> None:
        self._level(EMERGENCY_LEVEL_UNSPECIFIED)
        self._emitter.emit(
            events.EMERGENCY_CLEARED,
            emergency_level=level_word(report.before.level),
            by=report.by.name.lower(),
            reason=report.reason,
            origin=report.origin,
        )

    def _told(self, report: Broadcast) -> None:
        metrics = self._metrics
        if report.error:
            metrics.emergency_broadcast_failures_total.inc()
            self._emitter.emit(
                events.EMERGENCY_BROADCAST_FAILED, reason=report.notice.signal.reason, detail=report.error
            )
            return
        metrics.emergency_broadcasts_total.inc()
        metrics.emergency_bypass_applied_total.inc()
        metrics.emergency_last_broadcast_latency_ms.set(report.latency_ns / _MS)

    def _level(self, level: EmergencyLevel.ValueType) -> None:
        self._metrics.emergency_level.set(level)
        self._metrics.emergency_halt.set(level == EMERGENCY_LEVEL_HALT)


def level_word(level: EmergencyLevel.ValueType) -> str:
    """A level as people have it."""
    return EmergencyLevel.Name(level).removeprefix("EMERGENCY_LEVEL_").lower()
