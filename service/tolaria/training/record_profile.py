"""Writes what becomes of profiles into metrics, events and the log. Takes no decisions."""

from __future__ import annotations

import structlog

from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics
from tolaria.telemetry.profiler import TraceFailed, TraceWritten


class ProfileRecorder:
    """Used on the event loop only."""

    def __init__(self, metrics: Metrics, emitter: Emitter) -> None:
        self._metrics = metrics
        self._emitter = emitter
        self._log = structlog.get_logger()
        metrics.profiler_enabled.set(0)

    def begun(self, steps: int) -> None:
        """A window of so many steps is open."""
        self._metrics.profiler_enabled.set(1)
        self._log.info("profile_begun", steps=steps)

    def written(self, trace: TraceWritten) -> None:
        """A window has ended with a trace."""
        self._metrics.profiler_enabled.set(0)
        self._metrics.profiler_traces_emitted_total.inc()
        self._log.info(
            "profile_written",
            path=str(trace.path),
            size_bytes=trace.size_bytes,
            steps=trace.steps,
            export_ms=round(trace.export_s * 1000, 1),
            removed=trace.removed,
        )

    def failed(self, failure: TraceFailed) -> None:
        """A window was not begun, or has ended without a trace, for a reason that somebody should see to."""
        self._metrics.profiler_enabled.set(0)
        self._metrics.profiler_traces_failed_total.inc()
        self._emitter.emit(events.PROFILER_EXPORT_FAILED, stage=failure.stage, reason=failure.reason)

    def abandoned(self) -> None:
        """The run has ended within a window: no trace, and nothing that went wrong."""
        self._metrics.profiler_enabled.set(0)
        self._log.info("profile_abandoned", reason="the run has ended")
