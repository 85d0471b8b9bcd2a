"""`SpareLane`: a process of the lane that has imported PyTorch before it is needed, in place of one that dies."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import structlog

from tolaria.cgroups import kills_together, memory_left
from tolaria.config import Settings
from tolaria.errors import ChildFailedError
from tolaria.processes import ChildSupervisor, RestartPolicy
from tolaria.ranks.local_ranks import children_of, state_of
from tolaria.signals.lane_page import LanePage
from tolaria.transport.lane_end import kill_group
from tolaria.transport.lane_start import StartedLane, accept_lane, connected, lane_command
from tolaria.transport.nodes import Formation

_MEMORY_BYTES: Final = 2**31
"""Memory that must be left for each process: several times what one takes that has only imported PyTorch."""

_FIRST_KILLED: Final = "1000"
"""Score by which the system, out of memory, ends this process before any other, and so not the lane."""

_STOPPED: Final = {"T", "t"}

_log = structlog.get_logger(__name__)


class SpareLane(ChildSupervisor):
    """Keeps one process ready, or the ranks of a group on this machine, with nothing of the job's in it.

    One is started for each lane that was built `lane.spare_after_s` ago. If it ends by itself it is not replaced before
    the lane is, since memory may be short.

    Args:
        settings: of the service.
        start_timeout_s: seconds from the start of the process to its first word.
    """

    def __init__(self, settings: Settings, start_timeout_s: float) -> None:
        super().__init__(
            lane_command(settings),
            restarts=RestartPolicy(pause_s=0.0, restarts_max=0),
            start_timeout_s=start_timeout_s,
            stop_timeout_s=0.0,
        )
        self._lane = settings.lane
        self._busy = self._was_killed = False
        self._idle: anyio.Event | None = None
        self._started: StartedLane | None = None
        self._waiting: anyio.CancelScope | None = None

    async def keep(self, is_due: Callable[[], bool], on_killed: Callable[[], Awaitable[None]]) -> None:
        """Starts a process after the time set if `is_due` then, and keeps it until it is taken or this is cancelled.

        Calls `on_killed` if it is killed before that. Does nothing while another call keeps one.
        """
        if not self._lane.spare_after_s:
            return
        await anyio.sleep(self._lane.spare_after_s)
        if self._busy or not is_due():
            return
        self._busy, self._idle = True, anyio.Event()
        try:
            if await anyio.to_thread.run_sync(self._has_memory) and is_due():
                await self._keep()
        except ChildFailedError as error:
            if self._was_killed:
                await on_killed()
            _log.warning("spare_lane_failed", error=str(error))
        except (OSError, MemoryError, RuntimeError) as error:  # no descriptor, thread or process is left for it
            _log.warning("spare_lane_failed", error=str(error))
        finally:
            await self.stop()
            self._busy = False
            self._idle.set()

    async def take(self) -> StartedLane | None:
        """Returns the process that is ready, which from then on is the caller's; None if there is none.

        One that is stopped, or has a stopped rank, would do nothing: it is ended. The output of the one that is
        returned is read, and its score is that of a spare one, until `released` returns.
        """
        started = self._started
        if started is None or self._waiting is None:
            return None
        is_stopped = await anyio.to_thread.run_sync(_is_stopped, self.pid)
        if self._started is not started or started.child.process.returncode is not None:
            return None
        self._waiting.cancel()
        if is_stopped:
            _log.warning("spare_lane_failed", error="it is stopped, as by a debugger")
            return None
        self._started = self._child = None
        return started

    async def released(self) -> None:
        """Waits until nothing is done here any more with the process that was taken."""
        if self._idle is not None:
            await self._idle.wait()
        if failure := await anyio.to_thread.run_sync(_set_score, self.pid, None):
            _log.warning("spare_lane_failed", error=f"it stays the first to be killed for lack of memory: {failure}")

    def accept(self, announcement: Mapping[str, Any]) -> None:
        """Takes the announcement that every process of the lane makes."""
        accept_lane(announcement)

    async def stop(self) -> None:
        """Stops the process if it is not taken, and the ranks that it has started."""
        started, self._started = self._started, None
        if started is not None:
            started.connection.close()
        runs = self._child is not None and self._child.process.returncode is None
        with anyio.CancelScope(shield=True):
            ranks = await anyio.to_thread.run_sync(children_of, self.pid) if runs else []
            await super().stop()
        for pid in ranks:
            kill_group(pid)

    def _has_memory(self) -> bool:
        """Whether a process can do no harm; reads files."""
        left, wanted = memory_left(), _MEMORY_BYTES * self._lane.processes
        if (left is None or left >= wanted) and not kills_together():
            return True
        _log.info(
            "spare_lane_left_out",
            memory_left_mb=None if left is None else left >> 20,
            memory_wanted_mb=wanted >> 20,
            killed_together=kills_together(),
        )
        return False

    async def _keep(self) -> None:
        """Starts a process; returns once it has been taken. Raises ChildFailedError if it ends before that."""
        page = LanePage.create()
        with connected(page, self._lane, Formation()) as place:
            self.command = replace(self.command, arguments=place.arguments, descriptors=place.descriptors)
            self._was_killed = False
            child = await self.start()
            await anyio.to_thread.run_sync(_set_score, self.pid, _FIRST_KILLED)
        self._started = StartedLane(child, page, place.connection)
        _log.info("spare_lane_started", pid=self.pid)
        with anyio.CancelScope() as self._waiting:
            detail = await child.ended()
            self._was_killed = child.process.returncode == -signal.SIGKILL
            raise ChildFailedError("spare lane", detail)


def _is_stopped(pid: int) -> bool:
    """Whether a process, or a rank that it has started, is stopped; reads files."""
    for each in (pid, *children_of(pid)):
        with suppress(OSError):  # it has gone
            if state_of(each) in _STOPPED:
                return True
    return False


def _set_score(pid: int, score: str | None) -> str:
    """Sets how soon the system ends a process, and the ranks that it has started, when it has no memory.

    None: as soon as this process. Reads and writes files. Returns why it cannot be set; empty if it is, or the process
    has gone.
    """
    score, failure = score or Path("/proc/self/oom_score_adj").read_text(encoding="ascii"), ""
    done = set[int]()
    while left := {pid, *children_of(pid)} - done:  # those that are started meanwhile inherit one of the two
        for each in sorted(left, key=lambda one: one != pid):
            try:
                Path(f"/proc/{each}/oom_score_adj").write_text(score, encoding="ascii")
            except (FileNotFoundError, ProcessLookupError):  # it has gone
                continue
            except OSError as error:
                failure = str(error)
        done |= left
    return failure
