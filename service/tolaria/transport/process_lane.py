"""`ProcessLane`: the lane in a separate process, as the run uses it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

import anyio
import structlog

from tolaria.config import LaneSettings, Settings
from tolaria.errors import LaneError, LaneFailedError, LaneLostError, WireError
from tolaria.images import StateImage
from tolaria.lane import encoding, messages
from tolaria.lane.messages import (
    CommandDone,
    Event,
    Hold,
    LaneEnded,
    LaneLost,
    LaneReady,
    LaneRestarted,
    Release,
    RunEpoch,
    SnapshotsChanged,
    Stop,
)
from tolaria.lane.order import RestorePlan
from tolaria.segments import numbers_of
from tolaria.transport.lane_images import HeldSegments, LaneImages
from tolaria.transport.lane_process import LaneProcess
from tolaria.transport.rendezvous import Rendezvous
from tolaria.transport.replicas import ReplicaKeeper
from tolaria.values.failure import Failure
from tolaria.values.optimization import ActiveAdjustment
from tolaria.wire import Frame, FrameKind, packed_id, unpacked_events, unpacked_id

_COMMANDS_UNANSWERED_MAX: Final = 256

_SOUND_LIFE_S: Final = 600.0
"""Seconds after which an exception is no repetition of those before it."""

_SAME_FAILURES_MAX: Final = 3
"""Exceptions in a row of which the last one ends the run if they are the same.

The first may pass, such as a file that was not to be read; before the third, the batch has been left out.
"""


_log = structlog.get_logger(__name__)


class ProcessLane:
    """A `LaneHandle` of the run. Used on the event loop only; `serve` is its task.

    Between the loss of a process and the next one that is ready, it refuses commands and forgets holds and orders: the
    run repeats what it still wants after `LaneRestarted`. A hold from before the first one is ready is kept for it.

    Args:
        settings: the lane is built from them.
        checkpoint: the first process resumes from it, an image and the run's adjustments of learning rates.

    Attributes:
        images: the pool through which run and lane exchange images.
        plan: says what a process after the first one restores; as `LaneOwner.next_plan`.
        settings: those of the lane that are in force.
        drained: whether the end of the lane is not that of the run, which another service continues.
        rendezvous: where other machines join; None without any.
        replicas: keeps replicas of snapshots on one of them; None if the settings ask for none.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: tuple[StateImage, tuple[ActiveAdjustment, ...]] | None = None,
        run_id: str = "",
    ) -> None:
        segments = HeldSegments()
        self.images = LaneImages(segments, self._send)
        self.plan: Callable[[], Awaitable[tuple[RestorePlan, StateImage | None]]] = self._first_plan
        self.settings = settings.lane
        self._checkpoint = checkpoint
        self._segments = segments
        self.rendezvous = Rendezvous(settings, self) if settings.lane.nodes_max > 1 else None
        self.replicas: ReplicaKeeper | None = None
        if self.rendezvous is not None and settings.rollback.replicas:
            bandwidth = settings.rollback.replica_mb_per_s
            self.replicas = ReplicaKeeper(self.rendezvous, bandwidth, segments)
        self._process = LaneProcess(settings, segments, self, self.rendezvous)
        self._process.run_id = run_id
        self._hold_number = 0
        self._digests: tuple[str, ...] = ()
        self._next_segment = 1
        self._orphans = set[int]()
        self._events: list[Event] = []
        self._notify: Callable[[], object] = lambda: None
        self._unanswered: set[int] = set()
        self._ready: LaneReady | LaneEnded | None = None
        self._opened = anyio.Event()
        self._answering = self._over = self._stopping = False
        self._deaths: deque[float] = deque()
        self._put_off: tuple[int, RunEpoch] | None = None
        self._failures: list[str] = []
        self._failed_generation = 0  # in which the newest of them was, of the leader or of another rank
        self._ready_at_s = 0.0
        self._failed: Failure | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.get_ident()
        self.drained = False

    async def serve(self) -> None:
        """Keeps the lane running until it has ended, is given up, or this is cancelled.

        Raises BindError if the address at which other machines join cannot be listened on.
        """
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        if self.rendezvous is None:
            await self._process.serve()
        else:
            async with anyio.create_task_group() as tasks:
                await tasks.start(self.rendezvous.serve)
                if self.replicas is not None:
                    tasks.start_soon(self.replicas.serve)
                await self._serve_with_nodes(self.rendezvous)
                tasks.cancel_scope.cancel()
        self._end(LaneEnded(0, None))  # stopped while there was no process that could answer

    async def _serve_with_nodes(self, rendezvous: Rendezvous) -> None:
        try:
            await self._process.serve()
        finally:
            if (self._over or self._failed or self._stopping) and not self.drained:
                detail = "the run has ended" if self._failed is None else f"the run has failed: {self._failed}"
                with anyio.CancelScope(shield=True):
                    await rendezvous.end(failed=self._failed is not None, detail=detail)

    async def open(self) -> LaneReady | None:
        """Waits until the lane is built; returns what it has built, or None if it was stopped before.

        Raises the error for which it cannot be built.
        """
        await self._opened.wait()
        if isinstance(self._ready, LaneEnded):
            if self._ready.failure is not None:
                raise self._ready.failure.error()
            return None
        return self._ready

    # -- the handle --------------------------------------------------------------------------------------------------

    def start(self, notify: Callable[[], object]) -> None:
        """Has `notify` called when events can be taken; the process is started by `serve`."""
        self._notify = notify
        if self._events:
            notify()

    def send(self, command_id: int, command: messages.Command) -> None:
        """Sends a command. Raises LaneError when too many are unanswered, or there is no process that could answer."""
        page = self._process.page
        if isinstance(command, Stop):
            self._process.wanted, self._stopping = False, True
        elif isinstance(command, Hold | Release):
            self._hold_number = command.number if isinstance(command, Hold) else 0
            if page is not None:
                page.hold(self._hold_number)
        if not self._answering or (isinstance(command, Stop) and self._process.link is None):
            self._refuse(command)
            return
        if isinstance(command, RunEpoch) and self.settings.grow == "epoch" and self._can_grow:
            self._put_off = (command_id, command)
            self._grow()
            return
        if not isinstance(command, RunEpoch | Hold | Release | Stop):
            if len(self._unanswered) >= _COMMANDS_UNANSWERED_MAX:
                raise LaneError(f"{_COMMANDS_UNANSWERED_MAX} commands are waiting for a step boundary already")
            self._unanswered.add(command_id)
        self._send(Frame(FrameKind.COMMAND, packed_id(command_id, encoding.to_bytes(command))))

    @property
    def _can_grow(self) -> bool:
        return self.rendezvous is not None and self.rendezvous.can_grow

    def _grow(self) -> None:
        """Starts the group again in place of an epoch, once everything before that is done; or has it trained."""
        if self._put_off is None or self._unanswered or self._stopping:
            return
        (command_id, command), self._put_off = self._put_off, None
        if self._can_grow:
            self._process.regroup()
        else:
            self._send(Frame(FrameKind.COMMAND, packed_id(command_id, encoding.to_bytes(command))))

    def take_events(self) -> list[Event]:
        """Returns the events since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    def dump_stacks(self, why: str) -> None:
        """Has the stacks of all processes that compute written to a file in state.dir, soon."""
        self._process.dump_stacks(why)

    def forbid_restore(self, command_id: int) -> bool:
        """Forbids that restore to change live state; False when the change may have begun."""
        page = self._process.page
        return page is None or page.forbid(command_id)

    def close(self, timeout_s: float) -> bool:  # noqa: ARG002 - `abandon` leaves no process
        """Returns whether the lane has ended by itself."""
        return self._over

    def abandon(self) -> None:
        """Ends the process, whatever it does, and `serve`."""
        self._process.abandon()

    def phase(self) -> tuple[str, float]:
        """Returns what the lane does other than steps, and for how many seconds."""
        if self.rendezvous is not None and self.rendezvous.waiting:
            return self.rendezvous.waiting, time.monotonic() - self.rendezvous.waiting_since_s
        page = self._process.page
        return ("", 0.0) if page is None else page.phase()

    def adopt(self, settings: LaneSettings) -> None:
        """Uses these settings from the next decision on; those that are not live are as before."""
        self.settings = settings
        if self.rendezvous is not None:
            self.rendezvous.settings = settings

    # -- the owner of the process ------------------------------------------------------------------------------------

    def on_frames(self, frames: Sequence[Frame]) -> None:
        """Takes what a process has sent."""
        for frame in frames:
            match frame.kind:
                case FrameKind.EVENTS:
                    for data in unpacked_events(frame.content):
                        self._on_event(data)
                case FrameKind.SEGMENTS:
                    self._take_segments(frame)
                case FrameKind.SEGMENTS_FREED:
                    for number in numbers_of(frame):
                        self._segments.close(number)
                case FrameKind.IMAGE:
                    image_id, rest = unpacked_id(frame.content)
                    self.images.captured(image_id, unpacked_id(rest)[0])
                case FrameKind.READY:
                    self._on_ready(frame.content)
                case _:
                    raise WireError(f"the lane sent a {frame.kind.name.lower()} frame")
        if self._events:
            self._notify()

    def on_lost(self, kind: str, cause: str, batch: tuple[int, int] | None) -> None:
        """Reports a process that has ended, or the end of the lane if too many have died."""
        now_s, settings = time.monotonic(), self.settings
        if kind != "regrouped":
            self._deaths.append(now_s)
        while self._deaths and self._deaths[0] < now_s - settings.restarts_within_s:
            self._deaths.popleft()
        if len(self._deaths) > settings.restarts_max:
            self._process.abandon()
            within, count = f"within {settings.restarts_within_s:g} s", len(self._deaths)
            self.on_over(f"the lane has died {count} {'times' if count > 1 else 'time'} {within}, at last: {cause}")
            return
        if kind == "raised" and self._failed_generation != self._process.generation and self._counted(cause):
            self._process.abandon()
            self.on_over(cause)
            return
        self._lost()
        self._events.append(LaneLost(self._process.generation, kind, cause, batch))
        self._notify()

    def on_over(self, cause: str) -> None:
        """Reports the end of the lane; a death after `Stop` is no failure."""
        self._lost()
        if not self._opened.is_set():
            cause = f"the process of the lane has ended before the job was built: {cause}"
        self._end(LaneEnded(0, None if self._stopping else Failure.of(LaneFailedError(cause))))

    def on_node_lost(self, host: str, why: str) -> None:
        """Ends the group, of which a machine has gone."""
        self._process.node_lost(host, why)

    def on_ranks_ended(self, host: str, code: int, lines: Sequence[str]) -> None:
        """Ends the group, of which ranks elsewhere have failed."""
        self._process.ranks_ended(host, code, lines)

    def memory(self) -> tuple[tuple[str, ...], int, set[int]]:
        """Returns what a process gets to know of the memory of those before it."""
        self._orphans |= self.images.being_read
        return self._digests, self._next_segment, self._orphans

    async def next_plan(self) -> tuple[RestorePlan, StateImage | None]:
        """Returns what the next process restores; the first one resumes from the checkpoint that the run has loaded."""
        return await (self.plan() if self._opened.is_set() else self._first_plan())

    async def _first_plan(self) -> tuple[RestorePlan, StateImage | None]:
        image, decided = self._checkpoint or (None, ())
        return RestorePlan(decided=decided), image

    # -- what the process sends --------------------------------------------------------------------------------------

    def _on_event(self, data: bytes) -> None:
        event = encoding.from_bytes(data)
        if not isinstance(event, Event):
            raise WireError(f"the lane sent a {type(event).__name__}")
        if isinstance(event, CommandDone):
            self._unanswered.discard(event.command_id)
            self._grow()
        elif isinstance(event, SnapshotsChanged):
            self._digests = tuple(point.digest for point in event.points if point.digest is not None)
            self._close_orphans()
        elif isinstance(event, LaneEnded):
            self._on_lane_ended(event)
            return
        self._events.append(event)

    def _on_lane_ended(self, event: LaneEnded) -> None:
        """Ends the lane, unless another process is to try again after an exception of the job's."""
        self._answering = False
        if event.failure is not None and not self._stopping and not self._same_again(event.failure):
            self._process.ends(str(event.failure))
            return
        self._process.wanted = False
        self._process.ends()
        self._end(event)

    def _same_again(self, failure: Failure) -> bool:
        """Counts an exception of the job's; returns whether it was the same once too often in a row."""
        _log.error("lane_raised", error=str(failure), exception=failure.traceback)
        return self._counted(str(failure))

    def _counted(self, raised: str) -> bool:
        self._failed_generation = self._process.generation
        if time.monotonic() - self._ready_at_s > _SOUND_LIFE_S:
            self._failures = []
        self._failures = [*(each for each in self._failures if each == raised), raised]
        return len(self._failures) >= _SAME_FAILURES_MAX

    def _take_segments(self, frame: Frame) -> None:
        numbers = numbers_of(frame)
        if len(numbers) != len(frame.descriptors):
            raise WireError(f"{len(numbers)} segments came with {len(frame.descriptors)} descriptors")
        self._segments.put(dict(zip(numbers, frame.descriptors, strict=True)))
        self._next_segment = max([self._next_segment, *(number + 1 for number in numbers)])

    def _close_orphans(self) -> None:
        """Closes the segments that no process was given, since they were being read, once they are not any more."""
        for number in self._orphans - self.images.being_read if self._orphans else ():
            self._orphans.discard(number)
            self._segments.close(number)

    def _on_ready(self, content: bytes) -> None:
        """Handles a lane that has been built and has restored its state, or could not."""
        ready = encoding.from_bytes(content)
        if isinstance(ready, LaneReady):
            self._answering = self._process.wanted = not self._stopping
            self._process.built([rank.pid for rank in ready.ranks if rank.node == 0])
            self._ready_at_s = time.monotonic()
            if self._opened.is_set():
                self._events.append(LaneRestarted(self._process.generation, ready))
            elif self._process.page is not None:
                self._process.page.hold(self._hold_number)  # which may be older than the page
        elif isinstance(ready, LaneEnded):
            self._process.ends(str(ready.failure))
            if self._opened.is_set() and ready.failure is not None and self._same_again(ready.failure):
                self._process.wanted = False
        else:
            raise WireError(f"the lane sent a {type(ready).__name__}")
        self._open_with(ready)

    # -- ends --------------------------------------------------------------------------------------------------------

    def _open_with(self, ready: LaneReady | LaneEnded) -> None:
        if not self._opened.is_set():
            self._ready, self._checkpoint = ready, None
            self._failed = ready.failure if isinstance(ready, LaneEnded) else None
            self._opened.set()

    def _lost(self) -> None:
        self._answering, self._put_off = False, None
        self._unanswered.clear()
        self.images.lost()

    def _end(self, event: LaneEnded) -> None:
        if not self._over:
            self._over, self._failed = True, event.failure
            self._open_with(event)
            self._events.append(event)
            self._notify()

    # -- sending -----------------------------------------------------------------------------------------------------

    def _refuse(self, command: messages.Command) -> None:
        """Handles a command that no process can take."""
        if isinstance(command, Stop):
            self._process.abandon()
        elif not isinstance(command, RunEpoch | Hold | Release):  # those are repeated after `LaneRestarted`
            raise LaneLostError("the lane is being started")

    def _send(self, frame: Frame) -> None:
        """Sends a frame if there is a connection; called from any thread."""
        if threading.get_ident() == self._thread:
            if self._process.link is not None:
                self._process.link.send(frame)
        elif self._loop is not None:
            with suppress(RuntimeError):  # the loop has been closed: there is no lane any more
                self._loop.call_soon_threadsafe(self._send, frame)
