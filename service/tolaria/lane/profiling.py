"""Profiles a bounded number of steps with torch.profiler and writes Chrome traces (chrome://tracing, Perfetto).

Used in the lane's thread only, since torch profiles the thread that started the profiler. A failed profile is a
result, not an exception: training goes on. `dump_own_stacks` is for the stacks of a lane that is a thread.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, TypeAlias

import structlog
import torch
from torch._C._autograd import _profiler_enabled
from torch.profiler import ProfilerActivity, profile, record_function

from tolaria.errors import InvalidFieldError, WrongStateError
from tolaria.lane.messages import PROFILE_STEPS_MAX, ProfileDone, ProfileStarted, TraceFailed, TraceWritten
from tolaria.ranks.stacks import append_stacks, own_stacks, summary

Region = Literal["input", "forward", "backward", "merge", "optimizer", "boundary", "rollback"]
"""A part of a step that is named in traces; `input` is not, the lane shows it as its phase."""

Mark: TypeAlias = Callable[[Region], AbstractContextManager[object]]
"""Returns a context manager whose block appears under that name in the trace."""

_PREFIX: Final = "trace-"
_PARTIAL: Final = ".partial"
_TAIL_BYTES: Final = 16
_UNMARKED: Final = contextlib.nullcontext()

_log = structlog.get_logger(__name__)


def unmarked(_name: Region) -> AbstractContextManager[object]:
    """A `Mark` for use without a profiler."""
    return _UNMARKED


class LaneProfiler:
    """Profiles steps of the lane, one window at a time.

    Args:
        directory: of the traces, created when first needed.
        bytes_max: size of all traces together. The oldest ones are deleted; a larger single trace is not kept.
        resting: spans calls that may take seconds, so that the heartbeat monitor does not take them for a stall.
        wall_ns: clock for the names of traces, Unix nanoseconds.
    """

    def __init__(
        self,
        directory: Path,
        *,
        bytes_max: int,
        resting: Callable[[], AbstractContextManager[None]],
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._directory = directory
        self._bytes_max = bytes_max
        self.resting = resting
        self._wall_ns = wall_ns
        self._profile: profile | None = None
        self._steps = self._steps_left = 0

    def mark(self, name: Region) -> AbstractContextManager[object]:
        """Marks the block in the trace; regions may be nested. Costs about 0.15 us while no window is open."""
        return _UNMARKED if self._profile is None else record_function(name)

    def start(self, steps: int) -> ProfileStarted | TraceFailed:
        """Opens a window of the next 1 to 1000 steps. The first one of a process takes about a second.

        Raises InvalidFieldError for another number of steps, WrongStateError while a window is open.
        """
        if not 1 <= steps <= PROFILE_STEPS_MAX:
            raise InvalidFieldError("steps", f"must be 1 to {PROFILE_STEPS_MAX}, is {steps}")
        if self._profile is not None:
            raise WrongStateError(f"a profile is being taken, {self._steps_left} steps to go")
        if _profiler_enabled():  # a second profiler silently ends the first
            return TraceFailed("start", "the job's own profiler is running")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        profiler = profile(activities=activities)  # without acc_events, with which it would block 20 times as long
        try:
            with self.resting():
                profiler.start()
        except RuntimeError as error:
            return TraceFailed("start", str(error))
        self._profile = profiler
        self._directory = self._directory.absolute()  # readers of the trace may have another working directory
        self._steps = self._steps_left = steps
        return ProfileStarted(steps)

    def after_step(self, global_step: int) -> ProfileDone | None:
        """Counts a step; after the window's last one closes it and writes the trace. None: no window, or more to go."""
        if self._profile is None:
            return None
        self._steps_left -= 1
        if self._steps_left:
            return None
        with self.resting():
            return ProfileDone(global_step, self._finish(self._profile))

    def abandon(self) -> None:
        """Closes an open window without a trace."""
        if self._profile is not None:
            with contextlib.suppress(RuntimeError):  # it has ended either way
                self._stop(self._profile)

    def taken(self, path: Path) -> bytes:
        """Returns a trace and deletes it, with the directory if that is empty. Raises OSError."""
        content = path.read_bytes()
        path.unlink()
        with contextlib.suppress(OSError):
            path.parent.rmdir()
        return content

    def keep(self, content: bytes, rank: int, trace: TraceWritten) -> TraceWritten | TraceFailed:
        """Writes a trace that another rank has taken; returns the same with its path and what was removed for it."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._free_name(f"-rank{rank}")
            partial = path.with_name(path.name + _PARTIAL)
            partial.write_bytes(content)
            partial.rename(path)
            return replace(trace, path=str(path.absolute()), removed=self._make_room(path, len(content)))
        except OSError as error:
            return TraceFailed("export", str(error))

    def _finish(self, profiler: profile) -> TraceWritten | TraceFailed:
        started_s = time.monotonic()
        try:
            self._stop(profiler)
            path = self._export(profiler)
            size_bytes = path.stat().st_size
            if size_bytes > self._bytes_max:
                path.unlink()
                return TraceFailed("cap", f"a trace of {size_bytes} bytes is larger than the limit for all traces")
            removed = self._make_room(path, size_bytes)
        except (OSError, RuntimeError) as error:
            return TraceFailed("export", str(error))
        return TraceWritten(str(path), size_bytes, self._steps, time.monotonic() - started_s, removed)

    def _stop(self, profiler: profile) -> None:
        self._profile = None
        profiler.stop()

    def _export(self, profiler: profile) -> Path:
        """Writes, checks and renames a partial file: after an error the exporter leaves half a trace, silently."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._free_name()
        partial = path.with_name(path.name + _PARTIAL)
        try:
            profiler.export_chrome_trace(str(partial))
            with partial.open("rb") as trace:
                trace.seek(max(0, partial.stat().st_size - _TAIL_BYTES))
                if not trace.read().rstrip().endswith(b"}"):
                    raise OSError(f"{path.name} was not written completely")
            partial.rename(path)
        finally:  # also removes what crashes have left; the exporter appends its own suffix
            for leftover in self._directory.glob(f"{_PREFIX}*{_PARTIAL}*"):
                if leftover.is_file():
                    leftover.unlink(missing_ok=True)
        return path

    def _free_name(self, suffix: str = "") -> Path:
        """Returns an unused name: the time in UTC to the microsecond, so that names sort by age."""
        now_us = self._wall_ns() // 1000
        while True:
            moment = datetime.fromtimestamp(now_us // 1_000_000, UTC)
            path = self._directory / f"{_PREFIX}{moment:%Y%m%dT%H%M%S}.{now_us % 1_000_000:06}Z{suffix}.json"
            if not path.exists():
                return path
            now_us += 1

    def _make_room(self, newest: Path, size_bytes: int) -> int:
        """Deletes the oldest traces that do not fit beside the newest, and returns their number."""
        room_bytes, removed = self._bytes_max - size_bytes, 0
        for path in sorted(set(self._directory.glob(f"{_PREFIX}*.json")) - {newest}, reverse=True):
            room_bytes -= path.stat().st_size
            if room_bytes < 0:
                path.unlink(missing_ok=True)
                removed += 1
        return removed


def dump_own_stacks(path: Path, why: str) -> None:
    """Logs where this process is, and appends its stacks to a file. Blocks, as long as the disk does."""
    try:
        found = own_stacks()
        _log.error("lane_stacks", why=why, where=f"{summary({0: found})} (stacks in {path})")
        append_stacks(path, f"the service: {why}", {"the service": found})
    except OSError as error:
        _log.warning("stacks_not_written", file=str(path), detail=str(error))
