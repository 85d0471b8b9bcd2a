"""`TrackerFeed`: passes records of the log to one tracker, and keeps how far it has come in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from tolaria.trackers.records import LogPosition, LogReader, only_new, surviving_points
from tolaria.trackers.tracker import (
    NOTHING_LOGGED,
    Note,
    Point,
    Record,
    Rewind,
    RunEnd,
    TrackedRun,
    Tracker,
    TrackerState,
)

TRACKERS_DIR: Final = "trackers"
"""Directory in `state.dir` with a directory for the files of each tracker, and how far it has come."""


@dataclass(slots=True)
class Progress:
    """How far a tracker has come.

    Attributes:
        position: the end of the records that it has had.
        run: the run that is open, or that was the last one to be.
        ended: whether that run has ended.
        newest: the newest surviving steps by metric.
        memory: what the tracker itself keeps.
        gaps: segments of the log that were removed before the tracker had them.
        pid: the process that has come so far.
    """

    position: LogPosition = field(default_factory=LogPosition)
    run: TrackedRun | None = None
    ended: bool = True
    newest: dict[str, int] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    gaps: int = 0
    pid: int = 0

    @property
    def newest_step(self) -> int:
        """The newest surviving step of any metric."""
        return max(self.newest.values(), default=NOTHING_LOGGED)

    def save(self, path: Path) -> None:
        """Replaces the file."""
        self.pid = os.getpid()
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self)), encoding="utf-8")
        new.replace(path)


def progress_path(state_dir: Path, tracker: str) -> Path:
    """Returns where the progress of a tracker is kept."""
    return state_dir / TRACKERS_DIR / f"{tracker}.json"


def load_progress(path: Path) -> Progress:
    """Returns the progress that was saved; that of a new tracker if there is none, or it is unreadable."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        position, run = LogPosition(**saved.pop("position")), saved.pop("run")
        return Progress(position=position, run=None if run is None else TrackedRun(**run), **saved)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Progress()


class TrackerFeed:
    """Feeds a tracker with the records of a log. What the tracker raises passes through; nothing is saved then.

    Args:
        tracker: the tracker.
        directory: for its files.
        log: the directory of the log.
        path: where the progress is kept.
    """

    def __init__(self, tracker: Tracker, directory: Path, log: Path, path: Path) -> None:
        self._tracker = tracker
        self._directory = directory
        self._log = log
        self._path = path
        self._progress = load_progress(path)
        self._reader = LogReader(log, self._progress.position)
        self._opened = False

    def advance(self) -> bool:
        """Passes on what has been written since the last call; returns whether there was anything."""
        records = self._reader.read()
        for kind, group in groupby(records, key=lambda each: type(each[0])):
            batch = list(group)
            self._pass_on(kind, [record for record, _ in batch], batch[-1][1])
        progress = self._progress
        if (progress.position, progress.gaps) != (self._reader.position, self._reader.gaps):
            progress.position = self._reader.position
            progress.gaps += self._reader.gaps
            self._reader.gaps = 0
            progress.save(self._path)
        return bool(records)

    def close(self) -> None:
        """Closes the tracker; the run may be resumed."""
        if self._opened:
            self._opened = False
            self._tracker.close("")
            self._progress.save(self._path)

    def _pass_on(self, kind: type[Record], records: Sequence[Any], after: LogPosition) -> None:
        progress = self._progress
        handler: dict[type[Record], Callable[[Any], None]] = {
            TrackedRun: self._begin,
            Rewind: self._rewind,
            RunEnd: self._end,
        }
        if kind in handler:
            for record in records:
                handler[kind](record)
        elif progress.run is not None and not progress.ended:
            self._open()
            if kind is Point:
                self._log_points(records)
            elif kind is Note:
                self._tracker.annotate(records)
        self._progress.position = after  # of the run that the records may have begun
        self._progress.save(self._path)

    def _log_points(self, points: Sequence[Point]) -> None:
        newest = dict(self._progress.newest)  # kept when the tracker raises
        new = [point for point in (only_new(point, newest) for point in points) if point is not None]
        if new:
            self._tracker.log(new)
        self._progress.newest = newest

    def _begin(self, run: TrackedRun) -> None:
        """Begins a run, goes on with it after a restart, or notes that a segment of the log begins."""
        progress = self._progress
        known = progress.run is not None and progress.run.run_id == run.run_id
        if not known:
            self.close()
            self._progress = progress = Progress(position=progress.position, gaps=progress.gaps)
        progress.run, progress.ended = run, False
        if progress.newest_step > run.global_step:
            self._rewind(Rewind(run.global_step, run.attempt, run.time))
        self._open()

    def _rewind(self, to: Rewind) -> None:
        progress = self._progress
        if progress.run is None or progress.ended or progress.newest_step <= to.global_step:
            return
        self._open()
        newest = {name: min(step, to.global_step) for name, step in progress.newest.items()}
        progress.newest = newest
        self._tracker.rewind(to)

    def _end(self, end: RunEnd) -> None:
        if self._progress.run is not None and not self._progress.ended:
            self._open()
            self._opened = False
            self._tracker.close(end.outcome)
            self._progress.ended = True

    def _open(self) -> None:
        """Opens the tracker, at the latest before it gets a record."""
        progress = self._progress
        if self._opened or progress.run is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        state = TrackerState(self._directory, progress.newest_step, self._history, progress.memory)
        self._tracker.open(progress.run, state)
        self._opened = True

    def _history(self) -> Iterator[Point]:
        progress = self._progress
        run_id = "" if progress.run is None else progress.run.run_id
        for point in surviving_points(self._log, run_id, progress.position):
            if point.global_step <= progress.newest_step:
                yield point
