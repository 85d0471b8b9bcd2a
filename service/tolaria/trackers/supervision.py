"""`Tracking`: the log of metrics, and the processes of trackers that read it, beside a run."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread

from tolaria.config import Settings, bare_environment
from tolaria.processes import ChildCommand, ChildSupervisor, RestartPolicy, running
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics, start_at_zero
from tolaria.trackers.feed import Progress, load_progress, progress_path
from tolaria.trackers.metrics_log import MetricsLog
from tolaria.trackers.records import METRICS_DIR, LogPosition
from tolaria.trackers.tracker import Record

RESTARTS: Final = RestartPolicy(pause_s=5.0, pause_s_max=300.0, lived_s=600.0)
"""A tracker that fails is never given up: what it has missed is in the log."""

_START_TIMEOUT_S: Final = 120.0
_WATCH_S: Final = 1.0
_FLUSH_S: Final = 2.0
_DETAIL_MAX: Final = 500
_MARKS_MAX: Final = 10_000


class TrackerProcess(ChildSupervisor):
    """The process of one tracker, which is started again when it fails or makes no progress."""

    def __init__(self, name: str, settings: Settings, *, metrics: Metrics, emitter: Emitter) -> None:
        state_dir = Path(settings.state.dir).absolute()
        tracking = settings.tracking
        options = json.dumps(tracking.options.get(name, {}))
        arguments = (
            *(sys.executable, "-m", "tolaria.trackers", name),
            *("--state-dir", str(state_dir), "--options", options, "--close-s", str(tracking.close_s)),
        )
        super().__init__(
            ChildCommand(name, arguments, bare_environment(), keep_stderr=True),
            restarts=RESTARTS,
            start_timeout_s=_START_TIMEOUT_S,
            stop_timeout_s=tracking.close_s,
        )
        self._name = name
        self._path = progress_path(state_dir, name)
        self._timeout_s = tracking.timeout_s
        self._metrics = metrics
        self._emitter = emitter
        self._failing = self._hung = False
        self._position = LogPosition()
        self._announced = False
        self._moved_s = 0.0
        """When it last made progress."""
        self._marks: deque[tuple[LogPosition, float]] = deque()
        """What the tracker has not had yet: ends of the log, with the times at which they were seen."""
        self._gaps = 0
        metrics.tracker_up.labels(name).set(0)
        start_at_zero(metrics.tracker_failures_total, ((name,),))
        start_at_zero(metrics.tracker_lost_segments_total, ((name,),))

    def accept(self, announcement: Mapping[str, Any]) -> None:
        """Checks that it is the process of this tracker."""
        if announcement["tracker"] != self._name:
            raise ValueError(announcement["tracker"])
        self._announced, self._moved_s = True, anyio.current_time()

    def on_ended(self, detail: str, restart_in_s: float) -> None:
        """Reports the first of several failures in a row."""
        del restart_in_s
        self._announced = False
        if self._hung:
            detail = f"made no progress for {self._timeout_s:g} s"
        self._metrics.tracker_up.labels(self._name).set(0)
        self._metrics.tracker_failures_total.labels(self._name).inc()
        if not self._failing:
            self._emitter.emit(events.TRACKER_FAILED, tracker=self._name, detail=_last_line(detail))
        self._failing, self._hung = True, False

    async def watch(self, written: LogPosition) -> None:
        """Takes note of how far the tracker has come, and kills its process if it hangs."""
        progress = await anyio.to_thread.run_sync(load_progress, self._path, abandon_on_cancel=True)
        now_s = anyio.current_time()
        if progress.position > self._position:
            self._position, self._moved_s = progress.position, now_s
            self._came_on(progress)
        behind_s = self._behind(written, now_s)
        self._metrics.tracker_behind_seconds.labels(self._name).set(behind_s)
        if not self._marks:
            self._moved_s = now_s
        elif self._announced and now_s - self._moved_s > self._timeout_s:
            self._hung, self._announced = True, False
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _behind(self, written: LogPosition, now_s: float) -> float:
        """Returns the age of the oldest record that the tracker has not had; 0 if it has had all."""
        marks = self._marks
        if written > (marks[-1][0] if marks else self._position) and len(marks) < _MARKS_MAX:
            marks.append((written, now_s))
        while marks and marks[0][0] <= self._position:
            marks.popleft()
        return now_s - marks[0][1] if marks else 0.0

    def _came_on(self, progress: Progress) -> None:
        if progress.gaps > self._gaps:
            self._metrics.tracker_lost_segments_total.labels(self._name).inc(progress.gaps - self._gaps)
            self._gaps = progress.gaps
        if progress.pid != self.pid or not self._announced:  # what it did before it failed
            return
        self._metrics.tracker_up.labels(self._name).set(1)
        if self._failing:
            self._failing = False
            self._emitter.emit(events.TRACKER_RECOVERED, tracker=self._name)


class Tracking:
    """Records what a run reports, and feeds trackers. Used on the event loop only; no method waits for a tracker."""

    def __init__(self, settings: Settings, metrics: Metrics, emitter: Emitter) -> None:
        tracking = settings.tracking
        self._metrics = metrics
        self._emitter = emitter
        self._log = MetricsLog(Path(settings.state.dir) / METRICS_DIR, tracking.log_mb * 1_000_000)
        self._processes = [
            TrackerProcess(name, settings, metrics=metrics, emitter=emitter) for name in tracking.trackers
        ]
        self._close_s = tracking.close_s
        self._dropped = 0
        self._failing = False

    @property
    def enabled(self) -> bool:
        """Whether anything is recorded."""
        return self._log.enabled

    def put(self, record: Record) -> None:
        """Records something; returns at once."""
        self._log.put(record)

    @asynccontextmanager
    async def serve(self, left_s: Callable[[], float]) -> AsyncIterator[None]:
        """Records and feeds while the block runs; trackers then get `tracking.close_s`, or less if `left_s()` is less.

        Nothing that a tracker does is raised here.
        """
        self._log.start()
        async with running(*(process.run for process in self._processes), self._watch):
            try:
                yield
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(self._log.close, max(0.0, min(_FLUSH_S, left_s())))
                    for process in self._processes:
                        process.stop_timeout_s = max(0.0, min(self._close_s, left_s()))

    async def _watch(self) -> None:
        while True:
            await anyio.sleep(_WATCH_S)
            self._report_log()
            for process in self._processes:
                await process.watch(self._log.written)

    def _report_log(self) -> None:
        log = self._log
        self._metrics.metrics_log_dropped_total.inc(log.dropped - self._dropped)
        self._dropped = log.dropped
        if log.problem and not self._failing:
            self._emitter.emit(events.METRICS_LOG_FAILED, detail=log.problem)
        self._failing = bool(log.problem)


def _last_line(detail: str) -> str:
    """Returns what a process ended with and the last line that it wrote, which names the error of a traceback."""
    ended, _, text = detail.partition(": ")
    lines = text.strip().splitlines()
    return f"{ended}: {lines[-1]}"[:_DETAIL_MAX] if lines else ended
