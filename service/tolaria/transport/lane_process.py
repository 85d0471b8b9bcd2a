"""`LaneProcess`: starts the process of the lane, notices its end and its silence, and starts it again."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import structlog
from anyio.abc import TaskGroup

from tolaria.config import Settings, child_environment
from tolaria.images import StateImage
from tolaria.lane.encoding import to_bytes
from tolaria.lane.messages import LaneOrder
from tolaria.processes import ChildCommand, ChildProcess, ChildSupervisor, RestartPolicy
from tolaria.segments import share
from tolaria.signals.lane_page import LanePage
from tolaria.transport.lane_images import HeldSegments
from tolaria.transport.lane_link import LaneLink
from tolaria.values.optimization import ActiveAdjustment
from tolaria.wire import DESCRIPTORS_MAX, Frame, FrameKind, packed_id

_START_S: Final = 60.0
_STOP_S: Final = 2.0
_WATCH_S: Final = 0.25
_DUMP_S: Final = 0.2
_LAST_FRAMES_S: Final = 2.0
_LINE_MAX: Final = 2000
_STACKS_SIGNAL: Final = signal.SIGUSR1
_CHECKPOINT_ID: Final = 1

_log = structlog.get_logger(__name__)


class LaneProcess(ChildSupervisor):
    """Keeps one process of the lane running: each has its connection and its page.

    Args:
        settings: the lane is built from them.
        segments: memory of the lanes before, which each new one gets.
        on_frames: called with what a process sends.
        on_lost: called when a process has ended and another one follows, with kind, cause and batch of `LaneLost`.
        on_over: called when a process has ended and none follows, with the cause.

    Attributes:
        generation: number of the latest process, from 1; 0 before the first.
        page: that of the latest process.
        link: the connection to the process; None if there is none.
        digests: of the snapshots that the next process is to take over.
        raised: the exception that has ended the process, if it has sent one.
        next_segment: the lowest number that no segment has.
        checkpoint: what the next process resumes from: an image and the run's adjustments of learning rates.
        leased: returns the numbers of segments that it must not get, since they are being read.
    """

    def __init__(
        self,
        settings: Settings,
        segments: HeldSegments,
        *,
        on_frames: Callable[[Sequence[Frame]], None],
        on_lost: Callable[[str, str, tuple[int, int] | None], None],
        on_over: Callable[[str], None],
    ) -> None:
        lane = settings.lane
        super().__init__(
            ChildCommand("lane", (), child_environment(settings), keep_stderr=True),
            restarts=RestartPolicy(
                pause_s=lane.restart_pause_s,
                pause_s_max=lane.restart_pause_max_s,
                restarts_max=lane.restarts_max,
                lived_s=lane.restarts_within_s,
            ),
            start_timeout_s=_START_S,
            stop_timeout_s=_STOP_S,
        )
        self._settings = settings
        self._segments = segments
        self._on_frames, self._on_lost, self._on_over = on_frames, on_lost, on_over
        self.generation = 0
        self.page: LanePage | None = None
        self.link: LaneLink | None = None
        self.digests: tuple[str, ...] = ()
        self.next_segment = 1
        self._orphans = set[int]()
        self.wanted = False
        self.raised = ""
        self.leased: Callable[[], set[int]] = set
        self.checkpoint: tuple[StateImage, tuple[ActiveAdjustment, ...]] | None = None
        self._tasks: TaskGroup | None = None
        self._fault = self._silent = self._line = ""
        self._exit_code: int | None = None
        self._out_of_memory = 0

    async def serve(self) -> None:
        """Keeps the lane running until it is not wanted any more, is given up, or this is cancelled."""
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._watch)
            await self.run()
            self._tasks.cancel_scope.cancel()

    async def start(self) -> ChildProcess:
        """Starts a process and sends it what it is to build. Raises ChildFailedError as `ChildSupervisor.start`."""
        self.page, self._fault, self._silent = LanePage.create(), "", ""
        self._exit_code, self._out_of_memory, self.raised = None, out_of_memory(), ""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        stdout = os.dup(1)
        try:
            descriptors = {"connection": theirs.fileno(), "page": self.page.segment.descriptor, "stdout": stdout}
            arguments = [f"--{name}={descriptor}" for name, descriptor in descriptors.items()]
            program = (sys.executable, "-m", "tolaria.lane", f"--service-pid={os.getpid()}", *arguments)
            self.command = replace(self.command, arguments=program, descriptors=tuple(descriptors.values()))
            child = await super().start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(stdout)
        self.generation += 1
        self.link = LaneLink(ours, self._on_frames)
        if self._tasks is not None:
            self._tasks.start_soon(self.link.serve)
        await self._send_order(self.link)
        return child

    async def stop(self) -> None:
        """Stops the process if it runs, and what is left of its children."""
        link, self.link = self.link, None
        child = self._child
        with anyio.CancelScope(shield=True):
            if link is not None:
                if child is not None and child.process.returncode is not None:
                    with anyio.move_on_after(_LAST_FRAMES_S):
                        await link.ended.wait()  # what it has sent last
                self._fault = link.fault
                link.close()
            await super().stop()
            if child is not None:
                self._exit_code = child.process.returncode
                kill_group(child.process.pid)

    def abandon(self) -> None:
        """Ends `serve` at once, and the process, which has not been built."""
        self.wanted = False
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()

    def kill(self) -> None:
        """Kills the process, as it cannot be used any more."""
        if self._child is not None and self._child.process.returncode is None:
            kill_group(self.pid)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def accept(self, announcement: Mapping[str, Any]) -> None:
        """Refuses anything but {"lane": its process id}."""
        if not isinstance(announcement["lane"], int):
            raise TypeError("not a process id")

    def on_started(self) -> None:
        """Logs the process."""
        _log.info("lane_started", generation=self.generation, pid=self.pid)

    def on_stderr(self, text: str) -> None:
        """Passes on what the job writes, by whole lines."""
        lines, newline, self._line = (self._line + text).rpartition("\n")
        if len(self._line) > _LINE_MAX:
            lines, newline, self._line = lines + newline + self._line, "\n", ""
        if newline and lines.strip():
            _log.info("lane_wrote", text=lines)

    def on_ended(self, detail: str, restart_in_s: float) -> None:
        """Reports the loss; a new process follows."""
        kind, cause = self._loss(detail)
        _log.error("lane_lost", generation=self.generation, kind=kind, cause=cause, restart_in_s=restart_in_s)
        self._on_lost(kind, cause, None if self.page is None else self.page.batch)

    def on_last_end(self, detail: str) -> None:
        """Reports the end of a process that is not to be started again."""
        self._on_over(self._loss(detail)[1])

    def on_given_up(self, detail: str, failures: int) -> None:
        """Reports the end of the lane."""
        kind, cause = self._loss(detail)
        _log.critical("lane_given_up", generation=self.generation, deaths=failures, kind=kind, cause=cause)
        self._on_over(f"the lane has died {failures} times in a row, the last time: {cause}")

    # -- parts -------------------------------------------------------------------------------------------------------

    def _loss(self, detail: str) -> tuple[str, str]:
        """Returns the kind and the cause of the end of the process; `detail` has the end of its standard error."""
        code = self._exit_code
        if code is not None and code < 0:
            detail = detail.replace(f"ended with code {code}", f"was killed by {_signal_name(-code)}")
        if self.raised:
            return "raised", self.raised
        if self._silent:
            return "silent", f"{self._silent}; it {detail}"
        if self._fault:
            return "connection", f"{self._fault}; it {detail}"
        if out_of_memory() > self._out_of_memory:
            return "out_of_memory", f"the cgroup is out of memory; it {detail}"
        return ("killed" if code is not None and code < 0 else "exited"), f"it {detail}"

    async def _send_order(self, link: LaneLink) -> None:
        self._orphans |= self.leased()
        held = [(number, fd) for number, fd in self._segments.descriptors() if number not in self._orphans]
        for start in range(0, len(held), DESCRIPTORS_MAX):
            part = held[start : start + DESCRIPTORS_MAX]
            numbers = json.dumps([number for number, _ in part]).encode()
            link.send(Frame(FrameKind.SEGMENTS, numbers, tuple(descriptor for _, descriptor in part)))
        order = LaneOrder(json.dumps(self._settings.model_dump(mode="json")), self.digests, self.next_segment)
        if self.checkpoint is not None:
            image, decided = self.checkpoint
            order = replace(order, image_id=_CHECKPOINT_ID, decided=decided)
            segment = await anyio.to_thread.run_sync(share, image)
            link.send(Frame(FrameKind.IMAGE, packed_id(_CHECKPOINT_ID), (segment.descriptor,), owner=segment))
        link.send(Frame(FrameKind.ORDER, to_bytes(order)))

    def close_orphans(self) -> None:
        """Closes the segments that no process was given, since they were being read, once they are not any more."""
        for number in self._orphans - self.leased() if self._orphans else ():
            self._orphans.discard(number)
            self._segments.close(number)

    async def _watch(self) -> None:
        """Kills a process that gives no heartbeat for longer than what it does may take."""
        while True:
            await anyio.sleep(_WATCH_S)
            page = self.page
            if self.link is None or page is None:
                continue
            if (silent_s := page.overdue_s()) > 0:
                _log.error("lane_silent", generation=self.generation, silent_s=round(silent_s, 1), pid=self.pid)
                with suppress(ProcessLookupError):
                    os.kill(self.pid, _STACKS_SIGNAL)
                await anyio.sleep(_DUMP_S)
                if page is self.page and page.overdue_s() > 0:  # the signal may have ended a wait
                    self._silent = f"the lane has given no heartbeat for {silent_s:.0f} s"
                    self.kill()


def out_of_memory() -> int:
    """Returns how many processes of this cgroup were killed because it had no memory; 0 if that is not known."""
    with suppress(OSError, ValueError, IndexError):
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").split("::", 1)[1].strip()
        events = Path(f"/sys/fs/cgroup{group}/memory.events").read_text(encoding="ascii")
        return int(events.partition("oom_kill ")[2].split()[0])
    return 0


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def kill_group(pid: int) -> None:
    """Kills a process that leads its group, and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
