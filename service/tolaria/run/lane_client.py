"""The event loop's client of the lane: submits commands, holds and releases it, takes its events in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import anyio

from tolaria.errors import LaneError, LaneLostError, LaneStoppedError
from tolaria.images import ImagePool
from tolaria.lane import messages

_Result = TypeVar("_Result")


class LaneHandle(Protocol):
    """A lane as its client sees it. Every method returns at once unless it says otherwise."""

    @property
    def images(self) -> ImagePool:
        """The pool through which the two sides exchange images by id."""

    def start(self, notify: Callable[[], object]) -> None:
        """Starts the lane; it calls `notify`, which any thread may do, when events can be taken."""

    def send(self, command_id: int, command: messages.Command) -> None:
        """Queues a command; `Hold`, `Release` and `Stop` act at once. Raises LaneError when too many are queued."""

    def take_events(self) -> list[messages.Event]:
        """Returns the events since the last call, oldest first."""

    def forbid_restore(self, command_id: int) -> bool:
        """Forbids that restore to change live state; False when the change has already begun."""

    def dump_stacks(self, why: str) -> None:
        """Has the stacks of all processes that compute written to a file in state.dir, soon."""

    def close(self, timeout_s: float) -> bool:
        """Stops the lane, drops its events and waits up to `timeout_s`; returns whether it has ended. Blocks."""


@dataclass(frozen=True, slots=True)
class PendingCommand:
    """A submitted command and the future of its `CommandDone`."""

    command: messages.BoundaryCommand
    done: asyncio.Future[messages.CommandDone]


class LaneClient:
    """Submits commands and passes events on, in the lane's order. Used on the event loop only.

    The run applies each event, then passes it to `settle`, `mark_held` or `mark_ended`, so that a future is completed
    only after its event has been applied.
    """

    def __init__(self, handle: LaneHandle) -> None:
        self._handle = handle
        self.images = handle.images
        self._next_id = 1
        self._pending: dict[int, PendingCommand] = {}
        self._holders: set[str] = set()
        self._hold_number = 0
        self.ended: messages.LaneEnded | None = None
        """How the lane ended; None while it runs."""
        self.lost = ""
        """Why there is no process of the lane at present; empty if there is one."""
        self.order = 0
        """Number of the newest order for an epoch; 0 before the first."""
        self.held = anyio.Event()
        """Set while the lane is held, and when it has ended; replaced for each hold."""

    @property
    def is_held(self) -> bool:
        """Whether the lane is held between two microbatches."""
        return bool(self._holders) and self.held.is_set() and self.ended is None

    async def reach_boundary(self) -> None:
        """Waits until the lane, which has to have a holder, is held.

        Raises LaneStoppedError if it ends first, and LaneLostError if its process does.
        """
        if self.ended is None and not self.lost:
            await self.held.wait()
        if self.ended is not None:
            raise LaneStoppedError("the run has ended before the next step boundary")
        if self.lost:
            raise LaneLostError(f"the lane has died: {self.lost}")

    def start(self, take: Callable[[list[messages.Event]], None]) -> None:
        """Starts the lane; `take` is called with its events, frame by frame."""
        loop = asyncio.get_running_loop()

        def deliver() -> None:
            if events := self._handle.take_events():
                take(events)

        self._handle.start(lambda: loop.call_soon_threadsafe(deliver))

    def run_epoch(self) -> None:
        """Orders the lane to train the rest of the current epoch, or else the next one."""
        self.order += 1
        self._send(messages.RunEpoch(self.order))

    def submit(self, command: messages.BoundaryCommand) -> asyncio.Future[messages.CommandDone]:
        """Submits `command` for the next step boundary; returns the future of its `CommandDone`.

        A refused command is a result, with `failure` set. The future raises `LaneStoppedError` if the lane ends
        first, and `LaneError` if too many commands are queued. A cancelled future does not cancel the command; an image
        that it captures is released.
        """
        future: asyncio.Future[messages.CommandDone] = asyncio.get_running_loop().create_future()
        future.add_done_callback(mark_retrieved)
        if self.ended is not None:
            future.set_exception(LaneStoppedError("the run has ended; there is no further step boundary"))
            return future
        try:
            self._pending[self._send(command)] = PendingCommand(command, future)
        except LaneError as error:
            future.set_exception(error)
        return future

    async def call(self, command: messages.BoundaryCommand) -> messages.CommandDone:
        """Submits `command` and waits for it.

        Raises the error of a refused command, which changed nothing, and what the future of `submit` raises.
        """
        future = self.submit(command)
        try:
            done = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._discard(future.result())
            raise
        if done.failure is not None:
            raise done.failure.error()
        return done

    def forbid_restore(self, future: asyncio.Future[messages.CommandDone]) -> bool:
        """Forbids a submitted restore to change live state; False when the change has already begun."""
        pending = next((number for number, entry in self._pending.items() if entry.done is future), None)
        return pending is not None and self._handle.forbid_restore(pending)

    def hold(self, holder: str) -> None:
        """Holds the lane between two microbatches, for as long as any holder wants it held."""
        if not self._holders:
            self.held = anyio.Event()
            self._hold_number += 1
            self._send(messages.Hold(self._hold_number))
        self._holders.add(holder)

    def release(self, holder: str) -> None:
        """Ends the hold of `holder`; the lane continues when no hold is left."""
        if self._holders == {holder}:
            self._send(messages.Release())
        self._holders.discard(holder)

    def held_for(self, holder: str) -> bool:
        """Whether `holder` wants the lane held."""
        return holder in self._holders

    def held_for_others(self, holder: str) -> bool:
        """Whether any holder but this one wants the lane held."""
        return bool(self._holders - {holder})

    def dump_stacks(self, why: str) -> None:
        """Has the stacks of all processes that compute written to a file in state.dir, soon."""
        self._handle.dump_stacks(why)

    def stop(self) -> None:
        """Ends the lane after its current step."""
        self._send(messages.Stop())

    def close(self, timeout_s: float) -> bool:
        """Ends the lane; returns whether it has ended within `timeout_s`. Blocks."""
        return self._handle.close(timeout_s)

    # -- events, applied by the run in order -------------------------------------------------------------------------

    def take_pending(self, event: messages.CommandDone) -> PendingCommand | None:
        """Removes and returns what was submitted under the event's id."""
        return self._pending.pop(event.command_id, None)

    def settle(self, pending: PendingCommand, event: messages.CommandDone) -> None:
        """Completes the future of a command whose event has been applied."""
        if pending.done.done():
            self._discard(event)
        else:
            pending.done.set_result(event)

    def mark_held(self, event: messages.Held) -> bool:
        """Records that the lane is held; returns whether the event answers the newest hold."""
        if newest := event.number == self._hold_number:
            self.held.set()
        return newest

    def mark_lost(self, event: messages.LaneLost) -> None:
        """Records that the lane's process has ended: what it has not answered raises `LaneLostError`."""
        self.lost = event.cause
        pending, self._pending = self._pending, {}
        for each in pending.values():
            if not each.done.done():
                each.done.set_exception(LaneLostError(f"the lane has died: {event.cause}"))
        self.held.set()  # wakes what waits for it, and is replaced: the next process is not held yet
        self.held = anyio.Event()

    def mark_restarted(self) -> None:
        """Records that another process takes commands; it is held if any holder wants it held."""
        self.lost = ""
        if self._holders:
            self._hold_number += 1
            self._send(messages.Hold(self._hold_number))

    def mark_ended(self, event: messages.LaneEnded) -> None:
        """Records that the lane has ended: every pending future raises `LaneStoppedError`."""
        self.ended = event
        self.held.set()
        pending, self._pending = self._pending, {}
        for entry in pending.values():
            if not entry.done.done():
                entry.done.set_exception(LaneStoppedError("the run has ended before the next step boundary"))

    def _send(self, command: messages.Command) -> int:
        command_id, self._next_id = self._next_id, self._next_id + 1
        self._handle.send(command_id, command)
        return command_id

    def _discard(self, event: messages.CommandDone) -> None:
        """Releases the image that a command captured for a caller that is no longer waiting."""
        if isinstance(event.result, messages.ImageCaptured):
            self.images.discard(event.result.image_id)


def mark_retrieved(future: asyncio.Future[_Result]) -> None:
    """Marks an exception as retrieved: a caller may submit a command without waiting for it."""
    if not future.cancelled():
        future.exception()
