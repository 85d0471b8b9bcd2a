"""Profiles a bounded window of steps with torch.profiler and leaves a Chrome trace (chrome://tracing, Perfetto).

Owns the window, the traces' names and the size of their directory. Used by the compute lane's thread alone, and it is
the only module of its room that sees torch. Must not know who asked for a profile, metrics or events.

A region costs next to nothing while no window is open, so that the step can always be marked. What goes wrong with a
profile is returned, never raised: training goes on.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch._C._autograd import _profiler_enabled
from torch.profiler import ProfilerActivity, profile, record_function

from tolaria.errors import InvalidFieldError, WrongStateError
from tolaria.values.profiling import STEPS_MAX, Region, TraceFailed, TraceWritten

_PREFIX: Final = "trace-"
_PARTIAL: Final = ".partial"
_TAIL_BYTES: Final = 16


class ProfileWindow:
    """At most one window at a time.

    Args:
        directory: for the traces and nothing else; made when first needed.
        bytes_max: all traces together; the oldest go first, and a trace that is larger by itself is not kept.
        wall_ns: the time in the traces' names, Unix nanoseconds.
    """

    def __init__(self, directory: Path, *, bytes_max: int, wall_ns: Callable[[], int] = time.time_ns) -> None:
        self._directory = directory
        self._bytes_max = bytes_max
        self._wall_ns = wall_ns
        self._profile: profile | None = None
        self._steps = self._steps_left = 0

    @property
    def open(self) -> bool:
        """Whether steps are being profiled."""
        return self._profile is not None

    def region(self, name: Region) -> AbstractContextManager[object]:
        """Mark what runs in the block; regions may be nested. 0.15 us while no window is open."""
        return _UNMARKED if self._profile is None else record_function(name)

    def begin(self, active_steps: int) -> TraceFailed | None:
        """Profile from now on, for this many steps; the first time in a process it takes about a second.

        Raises:
            InvalidFieldError: not 1 to 1000 steps.
            WrongStateError: a window is open.
        """
        if not 1 <= active_steps <= STEPS_MAX:
            raise InvalidFieldError("steps", f"must be 1 to {STEPS_MAX}, is {active_steps}")
        if self._profile is not None:
            raise WrongStateError(f"a profile is being taken, {self._steps_left} steps to go")
        if _profiler_enabled():  # a second profiler would end the first without a word
            return TraceFailed("start", "the job's own profiler is running")
        profiler = profile(activities=_activities())  # accumulating events would hold the lane up 20 times as long
        try:
            profiler.start()
        except RuntimeError as error:
            return TraceFailed("start", str(error))
        self._profile = profiler
        self._directory = self._directory.absolute()  # who is told of the trace may be somewhere else
        self._steps = self._steps_left = active_steps
        return None

    def step(self) -> TraceWritten | TraceFailed | None:
        """A step is done; the last of the window ends it and writes the trace. None: no window, or more to go."""
        if self._profile is None:
            return None
        self._steps_left -= 1
        return self._finish(self._profile) if self._steps_left == 0 else None

    def abandon(self) -> None:
        """End an open window without a trace, as when the lane ends."""
        if self._profile is not None:
            with contextlib.suppress(RuntimeError):  # it is ended either way
                self._stop(self._profile)

    def _finish(self, profiler: profile) -> TraceWritten | TraceFailed:
        started_s = time.monotonic()
        try:
            self._stop(profiler)
            path = self._export(profiler)
            size_bytes = path.stat().st_size
            removed = self._make_room(path)
        except (OSError, RuntimeError) as error:
            return TraceFailed("export", str(error))
        if removed is None:
            return TraceFailed("cap", f"a trace of {size_bytes} bytes is larger than all traces may be")
        return TraceWritten(str(path), size_bytes, self._steps, time.monotonic() - started_s, removed)

    def _stop(self, profiler: profile) -> None:
        self._profile = None
        profiler.stop()

    def _export(self, profiler: profile) -> Path:
        """Written aside, looked at and renamed: the exporter itself puts half a trace in place, and says nothing."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._free_name()
        partial = path.with_name(path.name + _PARTIAL)
        try:
            profiler.export_chrome_trace(str(partial))
            _check_whole(partial)
            partial.rename(path)
        finally:
            self._remove_leftovers()
        return path

    def _free_name(self) -> Path:
        """Named by the time in UTC, to the microsecond, so that names sort by age; counted up where one is taken."""
        now_us = self._wall_ns() // 1000
        while True:
            moment = datetime.fromtimestamp(now_us // 1_000_000, UTC)
            path = self._directory / f"{_PREFIX}{moment:%Y%m%dT%H%M%S}.{now_us % 1_000_000:06}Z.json"
            if not path.exists():
                return path
            now_us += 1

    def _make_room(self, newest: Path) -> int | None:
        """Remove the oldest traces until the rest fits; None: the newest itself does not."""
        if newest.stat().st_size > self._bytes_max:
            newest.unlink()
            return None
        sizes = {path: path.stat().st_size for path in sorted(self._directory.glob(f"{_PREFIX}*.json"))}
        total_bytes, removed = sum(sizes.values()), 0
        for path, size_bytes in sizes.items():
            if total_bytes <= self._bytes_max:
                break
            if path != newest:
                path.unlink(missing_ok=True)
                total_bytes -= size_bytes
                removed += 1
        return removed

    def _remove_leftovers(self) -> None:
        """Of a failed export, and of one that a crash broke off; the exporter adds an ending of its own."""
        for leftover in self._directory.glob(f"{_PREFIX}*{_PARTIAL}*"):
            if leftover.is_file():
                leftover.unlink(missing_ok=True)


class _Unmarked:
    """The region of a window that is not open."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


_UNMARKED: Final = _Unmarked()


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def _check_whole(path: Path) -> None:
    """The exporter of torch prints its errors and returns as if nothing had happened: a full disk, a missing directory.

    Raises:
        OSError: the file is not there, or does not end as JSON does.
    """
    with path.open("rb") as trace:
        trace.seek(0, os.SEEK_END)
        trace.seek(max(0, trace.tell() - _TAIL_BYTES))
        if not trace.read().rstrip().endswith(b"}"):
            raise OSError(f"{path.name} was not written to its end")
