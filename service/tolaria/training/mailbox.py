"""What the event loop tells the compute lane: which epoch to run, to hold, to go on, to stop.

Owns the lane's flags and its waiting. Must not know what an epoch is made of.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from tolaria.errors import LaneError

_EPOCHS_WAITING_MAX = 4


class Mailbox:
    """Commands in. `closed` is read by the lane between microbatches without a lock; all else is under one.

    Args:
        on_held: called from the lane's thread when it has come to a stand, once for every `hold`.
    """

    def __init__(self, on_held: Callable[[], None]) -> None:
        self.closed = False
        self._stopping = False
        self._on_held = on_held
        self._told_held = True
        self._epochs: deque[int] = deque()
        self._changed = threading.Condition()

    @property
    def stopping(self) -> bool:
        """Whether the lane shall end at the next fence."""
        return self._stopping

    def run_epoch(self, epoch: int) -> None:
        """Let the lane run `epoch` when it is free. Raises LaneError when too many wait."""
        with self._changed:
            if len(self._epochs) >= _EPOCHS_WAITING_MAX:
                raise LaneError(f"{_EPOCHS_WAITING_MAX} epochs are waiting for the lane already")
            self._epochs.append(epoch)
            self._changed.notify_all()

    def hold(self) -> None:
        """Let the lane come to a stand between two microbatches."""
        with self._changed:
            if not self.closed:
                self.closed, self._told_held = True, False
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

    def next_epoch(self) -> int | None:
        """Wait for work, in the lane's thread. None: end."""
        with self._changed:
            while not self._stopping:
                if not self._standing() and self._epochs:
                    return self._epochs.popleft()
                self._changed.wait()
            return None

    def pass_microbatch(self) -> bool:
        """Go on at once, or stand while the lane is held. False: give this step up and end."""
        if not self.closed or self._stopping:
            return True
        with self._changed:
            while self._standing() and not self._stopping:
                self._changed.wait()
            return not self._stopping

    def _standing(self) -> bool:
        if self.closed and not self._told_held:
            self._told_held = True
            self._on_held()
        return self.closed
