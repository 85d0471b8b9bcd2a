"""`LaneProcess`: starts the process of the lane, notices its end and its silence, and starts it again."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

import anyio
import anyio.to_thread
import structlog
from anyio.abc import TaskGroup

from tolaria.cgroups import oom_kills
from tolaria.config import Settings
from tolaria.config.ranks import PEER_LOST, RANK_ENDED
from tolaria.errors import ChildFailedError, LaneFailedError, TolariaError
from tolaria.images import StateImage
from tolaria.lane.encoding import to_bytes
from tolaria.lane.order import LaneOrder, RestorePlan
from tolaria.processes import ChildProcess, ChildSupervisor, RestartPolicy
from tolaria.ranks.liveness import Standstill
from tolaria.segments import allow_descriptors, segments_frames, share
from tolaria.signals.lane_page import SILENT_ENDS_S, LanePage
from tolaria.transport.lane_end import LaneEnd, kill_group
from tolaria.transport.lane_images import HeldSegments
from tolaria.transport.lane_link import LaneLink
from tolaria.transport.lane_stacks import LaneStacks
from tolaria.transport.lane_start import StartedLane, accept_lane, connected, lane_command
from tolaria.transport.nodes import Formation
from tolaria.transport.rendezvous import Rendezvous
from tolaria.transport.spare_lane import SpareLane
from tolaria.wire import Frame, FrameKind, packed_id

_START_S: Final = 60.0
_STOP_S: Final = 2.0
_LIVED_S: Final = 60.0
_EXIT_S: Final = 10.0
_GROUP_ENDED: Final = "the group has ended"
_WATCH_S: Final = 0.25
_DUMP_S: Final = 0.2
_AGENT_ENDS_S: Final = 3.0  # which finds out what rank has failed
_THAWED_S: Final = 30.0
_LAST_FRAMES_S: Final = 2.0
_LINE_MAX: Final = 2000
_CHECKPOINT_ID: Final = 1
_NO_CAUSES: Final = ("Extension modules:", "[W")
"""How lines begin that say nothing about an end: the last one of a crash, and warnings of torch's sockets."""

_log = structlog.get_logger(__name__)


class LaneOwner(Protocol):
    """What a `LaneProcess` tells, and asks, the lane that it belongs to."""

    def on_frames(self, frames: Sequence[Frame]) -> None:
        """Takes what a process has sent. Raises WireError, or what senseless content makes it raise."""

    def on_lost(self, kind: str, cause: str, batch: tuple[int, int] | None) -> None:
        """A process has ended and another one follows; the arguments are those of `LaneLost`."""

    def on_over(self, cause: str) -> None:
        """A process has ended and none follows."""

    def memory(self) -> tuple[tuple[str, ...], int, set[int]]:
        """Returns the digests of valid snapshots, the lowest number without a segment, and segments to withhold."""

    async def next_plan(self) -> tuple[RestorePlan, StateImage | None]:
        """Returns what the next process restores. Raises LaneFailedError if there is no such state any more."""


class LaneProcess(ChildSupervisor):
    """Keeps one process of the lane running: each has its connection and its page.

    Args:
        settings: the lane is built from them.
        segments: memory of the lanes before, which each new one gets.
        owner: takes what the process sends, and says what the next one is to do.
        rendezvous: of a group on several machines, of which the process is that on this one.

    Attributes:
        generation: number of the latest process, from 1; 0 before the first.
        page: that of the latest process.
        link: the connection to the process; None if there is none.
        wanted: whether another process follows when this one has ended; not before the first one is ready.
    """

    def __init__(
        self, settings: Settings, segments: HeldSegments, owner: LaneOwner, rendezvous: Rendezvous | None
    ) -> None:
        lane = settings.lane
        super().__init__(
            lane_command(settings),
            restarts=RestartPolicy(
                pause_s=lane.restart_pause_s, pause_s_max=lane.restart_pause_max_s, lived_s=_LIVED_S
            ),
            start_timeout_s=_START_S,
            stop_timeout_s=_STOP_S,
        )
        allow_descriptors()
        self._settings = settings
        self._spare = SpareLane(settings, _START_S)
        self._segments = segments
        self._owner = owner
        self._rendezvous = rendezvous
        self.run_id = ""
        self._stacks = LaneStacks(settings.state.dir, rendezvous)
        self._silent_rank_ns = 0
        self.generation = 0
        self.page: LanePage | None = None
        self.link: LaneLink | None = None
        self.wanted = False
        self._tasks: TaskGroup | None = None
        self._end = LaneEnd()
        self._line = ""
        self._build_s = math.inf

    async def serve(self) -> None:
        """Keeps the lane running until it is not wanted any more, or this is cancelled."""
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._watch)
            await self.run()
            self._tasks.cancel_scope.cancel()

    async def start(self) -> ChildProcess:
        """Starts a process and sends it what it is to build. Raises ChildFailedError as `ChildSupervisor.start`."""
        try:
            return await self._start()
        except (OSError, MemoryError, TolariaError) as error:
            if isinstance(error, LaneFailedError):  # no state can be restored
                self.wanted = False
            raise error if isinstance(error, ChildFailedError) else ChildFailedError("lane", str(error)) from error

    async def stop(self) -> None:
        """Stops the process if it runs, and what is left of its children."""
        link, self.link = self.link, None
        child, rendezvous = self._child, self._rendezvous
        misses_others = child is not None and child.process.returncode == PEER_LOST
        waits = misses_others and (self.wanted or self._build_s == math.inf)
        if rendezvous is not None and not waits:
            rendezvous.stop(_GROUP_ENDED)
        try:
            with anyio.CancelScope(shield=True):
                await self._stop(child, link)
            if rendezvous is not None and waits:
                await rendezvous.settled()  # a machine that is lost is the cause, and `node_lost` learns of it here
        finally:
            if rendezvous is not None and waits:
                rendezvous.stop(_GROUP_ENDED)

    async def _stop(self, child: ChildProcess | None, link: LaneLink | None) -> None:
        if link is not None:
            if child is not None and child.process.returncode is not None:
                with anyio.move_on_after(_LAST_FRAMES_S):
                    await link.ended.wait()  # what it has sent last
            self._end.fault = link.fault
            link.close()
        await super().stop()
        if child is not None:
            self._end.code = child.process.returncode if self._end.code_elsewhere is None else self._end.code_elsewhere
            for pid in (child.process.pid, *self._end.ranks):
                kill_group(pid)
            self._end.without_memory = await anyio.to_thread.run_sync(oom_kills) > self._end.out_of_memory

    def abandon(self) -> None:
        """Ends `serve`, and the process, whatever it does."""
        self.wanted = False
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()

    def built(self, ranks: Sequence[int] = ()) -> None:
        """Handles the end of building: later processes may take thrice as long, or `emergency.phase_timeout_s`.

        `ranks` are the processes that compute, which lead process groups: all of them end with this process.
        """
        self._end.ranks = tuple(ranks)
        if self._build_s == math.inf:
            self._build_s = max(3 * self._end.age_s, self._settings.emergency.phase_timeout_s)
        self._end.building = False
        if self._tasks is not None and self._rendezvous is None:
            self._tasks.start_soon(self._spare.keep, self._lives(self.generation), self._recount)

    def ends(self, raised: str = "") -> None:
        """Handles the process's last message: it exits now, after the exception `raised` if there is one."""
        self._end.raised, self._end.exits_by_s = raised, time.monotonic() + _EXIT_S

    def node_lost(self, host: str, why: str) -> None:
        """Ends the group, of which a machine has gone; as `GroupOwner.on_node_lost`."""
        self._end.lost = f"the machine {host} has gone: {why}"
        self.wanted = self.wanted or self._build_s == math.inf
        self._kill()

    def regroup(self) -> None:
        """Has the group start again, since more machines can take part."""
        self._end.regrouped = True
        self._kill()

    def ranks_ended(self, host: str, code: int, lines: Sequence[str]) -> None:
        """Ends the group, of which ranks elsewhere have failed; as `GroupOwner.on_ranks_ended`."""
        _log.info("lane_wrote", text="\n".join(lines), host=host)
        self._end.lines.extend(f"{line} on {host}" if RANK_ENDED.match(line) else line for line in lines)
        self._end.code_elsewhere = code
        self._kill()

    def dump_stacks(self, why: str) -> None:
        """Has the stacks of all ranks written to a file, soon."""
        if self._tasks is not None and self._child is not None:
            self._tasks.start_soon(self._stacks.dump, self.pid, why)

    def _lives(self, generation: int) -> Callable[[], bool]:
        return lambda: self.generation == generation and self.link is not None and self.wanted

    async def _recount(self) -> None:
        """Leaves out of the lane's causes what has killed another process, if that was for want of memory."""
        end, kills = self._end, await anyio.to_thread.run_sync(oom_kills)
        end.out_of_memory += kills > end.out_of_memory  # by one: the next one may be the lane's

    def _kill(self) -> None:
        if self._child is not None:  # else another process may have its id
            kill_group(self.pid)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def accept(self, announcement: Mapping[str, Any]) -> None:
        """Refuses anything but {"lane": its process id}."""
        accept_lane(announcement)

    def on_started(self) -> None:
        """Logs the process."""
        _log.info("lane_started", generation=self.generation, pid=self.pid)

    def on_stderr(self, text: str) -> None:
        """Passes on what the job writes, by whole lines."""
        lines, newline, self._line = (self._line + text).rpartition("\n")
        if len(self._line) > _LINE_MAX:
            lines, newline, self._line = lines + newline + self._line, "\n", ""
        if newline and lines.strip():
            self._end.lines.extend(line for line in lines.splitlines() if not line.startswith(_NO_CAUSES))
            _log.info("lane_wrote", text=lines)

    def on_ended(self, detail: str, restart_in_s: float) -> None:
        """Reports the loss; a new process follows."""
        kind, cause = self._end.described(detail)
        if self._build_s == math.inf:  # a machine has gone during the first build, which begins again
            self.wanted = False
            _log.error("group_not_built", generation=self.generation, cause=cause, restart_in_s=restart_in_s)
            return
        _log.error("lane_lost", generation=self.generation, kind=kind, cause=cause, restart_in_s=restart_in_s)
        self._owner.on_lost(kind, cause, None if self.page is None else self.page.batch)

    def on_last_end(self, detail: str) -> None:
        """Reports the end of a process that is not to be started again."""
        self._owner.on_over(self._end.described(detail)[1])

    # -- parts -------------------------------------------------------------------------------------------------------

    async def _start(self) -> ChildProcess:
        with Formation() if self._rendezvous is None else await self._rendezvous.form() as formation:
            self._end = LaneEnd(await anyio.to_thread.run_sync(oom_kills))
            started = await self._spawn(formation)
        self.generation, self.page = self.generation + 1, started.page
        self.link = LaneLink(started.connection, self._owner.on_frames)
        if self._tasks is not None:
            self._tasks.start_soon(self.link.serve)
        if self._rendezvous is not None:
            self._rendezvous.start(formation, self.generation)
        await self._send_order(self.link)
        return started.child

    async def _spawn(self, formation: Formation) -> StartedLane:
        """Starts the process that waits already, if there is one, or else another."""
        if (spare := await self._spare.take()) is not None:
            self._child, self.pid = spare.child, spare.child.process.pid
            try:
                await self._spare.released()
            except BaseException:
                spare.connection.close()
                raise
            spare.child.on_stderr = self.on_stderr
            return spare
        page = LanePage.create()
        with connected(page, self._settings.lane, formation) as place:
            self.command = replace(self.command, arguments=place.arguments, descriptors=place.descriptors)
            return StartedLane(await super().start(), page, place.connection)

    async def _send_order(self, link: LaneLink) -> None:
        plan, image = await self._owner.next_plan()
        digests, next_segment, withheld = self._owner.memory()
        held = [(number, fd) for number, fd in self._segments.descriptors() if number not in withheld]
        for frame in segments_frames(held):
            link.send(frame)
        secret = {"leyline": {"secret", "previous_secret"}}
        settings = json.dumps(self._settings.model_dump(mode="json", exclude=secret))
        order = LaneOrder(settings, digests, next_segment, plan, run_id=self.run_id)
        if image is not None:
            order = replace(order, image_id=_CHECKPOINT_ID)
            segment = await anyio.to_thread.run_sync(share, image)
            link.send(Frame(FrameKind.IMAGE, packed_id(_CHECKPOINT_ID), (segment.descriptor,), owner=segment))
        link.send(Frame(FrameKind.ORDER, to_bytes(order)))

    async def _watch(self) -> None:
        """Kills a process that is silent for longer than what it does may take, or does not end when it should."""
        # With this process the lane's may have stood still.
        standstill = Standstill(_WATCH_S, min(_THAWED_S, self._settings.emergency.heartbeat_timeout_s))
        while True:
            await standstill.sleep()
            page, end, others = self.page, self._end, self._rendezvous
            if self.link is None or page is None or end.silent or not standstill.is_over:
                continue  # a silent one has been killed
            overdue_s = page.overdue_s()
            if overdue_s > 0:
                _log.error("lane_silent", generation=self.generation, silent_s=round(overdue_s, 1), pid=self.pid)
                await self._end_silent(end, f"the lane has given no heartbeat for {overdue_s:.0f} s", page.overdue_s)
            elif (silent_s := page.agent_silent_s()) > self._settings.emergency.heartbeat_timeout_s:
                await self._end_silent(end, f"the agent of the group has given no heartbeat for {silent_s:.0f} s")
            elif end.building and end.age_s > self._build_s:
                await self._end_silent(
                    end, f"the lane has not been built within {self._build_s:.0f} s", end.still_building
                )
            elif (silent_ns := max(page.silent_rank_ns, others.silent_rank_ns if others else 0)) > self._silent_rank_ns:
                self._silent_rank_ns = silent_ns
                end.stacks = await self._stacks.dump(self.pid, "a rank gives no heartbeat")  # it ends itself
                end.batch, end.recovers_s = page.batch, time.monotonic() + SILENT_ENDS_S
            elif self.link.ended.is_set() or time.monotonic() > end.exits_by_s:
                await anyio.sleep(_AGENT_ENDS_S if self._settings.lane.mode == "torchrun" else _DUMP_S)
                if end is self._end:
                    kill_group(self.pid)
            elif end.stacks and end.goes_on(page.batch):
                _log.info("rank_recovered", generation=self.generation, detail=f"its stacks were {end.stacks}")
                end.stacks = ""  # a later end has another cause

    async def _end_silent(self, end: LaneEnd, why: str, still: Callable[[], float] = lambda: 1.0) -> None:
        """Dumps the stacks of a process and kills it, unless it is not `still` silent."""
        stacks = await self._stacks.dump(self.pid, why)
        if end is self._end and still() > 0:  # collecting them takes seconds
            end.silent, end.stacks = why, stacks
            kill_group(self.pid)
