"""The gate before the one copy of a restore: either it is granted before the deadline, or it never happens.

Owns the decision between two threads: the lane, which is about to change live state, and the event loop, whose
deadline has passed. One of the two comes first, and both then know which.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class CommitGate:
    """One restore's. `clock` gives monotonic seconds, as `deadline_s` is, and is read from both threads."""

    def __init__(self, deadline_s: float, clock: Callable[[], float]) -> None:
        self._deadline_s = deadline_s
        self._clock = clock
        self._lock = threading.Lock()
        self._granted = False
        self._shut = False

    def expired(self) -> bool:
        """Whether to give up; decides nothing. For the long work of finding, reading and verifying an image."""
        return self._shut or self._clock() >= self._deadline_s

    def refuses(self) -> bool:
        """Whether live state must stay as it is; False is the grant, once and for good, and the copy must follow.

        This is the `expired` of `StagedRestore.commit`, which asks it right before tensors change.
        """
        with self._lock:
            if not self._granted and self.expired():
                self._shut = True
            self._granted = not self._shut
            return self._shut

    def shut(self) -> bool:
        """Forbid the copy; False: it was granted before, and its end has to be waited for."""
        with self._lock:
            self._shut = not self._granted
            return self._shut
