"""What the event loop tells the compute lane: which epoch to run, what to do at a fence, to hold, to go on, to stop.

Owns the lane's flags and its waiting. Must not know what an epoch or a command is made of.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

from tolaria.errors import LaneError

_EPOCHS_WAITING_MAX = 4
_COMMANDS_WAITING_MAX = 256

Command = TypeVar("Command")


@dataclass(frozen=True, slots=True)
class Posted(Generic[Command]):
    """A command for the next fence; `ticket` comes back with its result."""

    ticket: int
    command: Command


class Mailbox(Generic[Command]):
    """Commands in. `closed` and `fence_due` are read by the lane without a lock; all else is under one.

    Args:
        on_held: called from the lane's thread when it has come to a stand, once for every `hold`, with its number.
            Must not wait for anything.
        resting: around every wait in the middle of work.
    """

    def __init__(
        self, on_held: Callable[[int], None], *, resting: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.closed = False
        self.fence_due = False
        self._stopping = False
        self._on_held = on_held
        self._resting = resting
        self._hold = 0
        self._told_hold = 0
        self._orders: deque[int] = deque()
        self._latest_order = 0
        self._urgent = False
        self._commands: deque[Posted[Command]] = deque()
        self._changed = threading.Condition()  # its lock is reentrant: waiting for work takes commands

    @property
    def stopping(self) -> bool:
        """Whether the lane shall end at the next fence."""
        return self._stopping

    @property
    def latest_order(self) -> int:
        """Number of the last order for an epoch, taken or waiting; 0 before the first."""
        return self._latest_order

    @property
    def orders_waiting(self) -> bool:
        """Whether an order for an epoch has not been taken yet."""
        return bool(self._orders)

    def run_epoch(self, order: int) -> None:
        """Let the lane run an epoch when it is free; numbers are the caller's. Raises LaneError when too many wait."""
        with self._changed:
            if len(self._orders) >= _EPOCHS_WAITING_MAX:
                raise LaneError(f"{_EPOCHS_WAITING_MAX} epochs are waiting for the lane already")
            self._orders.append(order)
            self._latest_order = order
            self._changed.notify_all()

    def post(self, ticket: int, command: Command, *, urgent: bool = False) -> None:
        """Let the lane carry a command out at the next fence. Raises LaneError when too many wait.

        For an `urgent` one an unfinished update is given up, as it is for any while the lane is held.
        """
        with self._changed:
            if len(self._commands) >= _COMMANDS_WAITING_MAX:
                raise LaneError(f"{_COMMANDS_WAITING_MAX} commands are waiting for a fence already")
            self._commands.append(Posted(ticket, command))
            self.fence_due = True
            self._urgent = self._urgent or urgent
            self._changed.notify_all()

    def hold(self, number: int) -> None:
        """Let the lane come to a stand between two microbatches; numbers are the caller's and go up."""
        with self._changed:
            self.closed, self._hold = True, number
            self._changed.notify_all()

    def release(self) -> None:
        """Let a held lane go on where it stands."""
        with self._changed:
            self.closed = False
            self._changed.notify_all()

    def stop(self) -> None:
        """Let the lane finish its step and end; a held one gives its unfinished step up."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def take_command(self) -> Posted[Command] | None:
        """The oldest command that waits for a fence, in the lane's thread; None when none does."""
        with self._changed:
            posted = self._commands.popleft() if self._commands else None
            self.fence_due = bool(self._commands)
            self._urgent = self._urgent and self.fence_due
            return posted

    def next_work(self) -> int | Posted[Command] | None:
        """Wait for an epoch or a command, in the lane's thread; commands come first. None: end."""
        with self._changed:
            while not (self._stopping and not self._commands):  # what was asked before the end is still carried out
                standing = self._standing()
                if self._commands:
                    return self.take_command()
                if not standing and self._orders:
                    return self._orders.popleft()
                self._changed.wait()
            return None

    def pass_fence(self) -> Posted[Command] | None:
        """Between two updates: stand while held; a command to carry out before asking again, or None: go on."""
        if not (self.closed or self.fence_due):
            return None
        with self._changed:
            while not self._stopping:
                standing = self._standing()
                if self._commands:
                    return self.take_command()
                if not standing:
                    return None
                with self._resting():
                    self._changed.wait()
            return None

    def pass_microbatch(self) -> bool:
        """Within an update: go on at once, or stand while the lane is held. False: give this update up.

        That is for what cannot wait for its end: the lane's own end while it is held, and commands, see `post`.
        """
        if not (self.closed or self._urgent):
            return True
        with self._changed:
            while self._standing() and not self._stopping and not self._commands:
                with self._resting():
                    self._changed.wait()
            return not (self._urgent or (self.closed and (self._stopping or self._commands)))

    def _standing(self) -> bool:
        if self.closed and self._told_hold != self._hold:
            self._told_hold = self._hold
            self._on_held(self._hold)
        return self.closed
