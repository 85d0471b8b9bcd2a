"""How often something may happen: at most so many times in any window of time. Holds no clock and sends nothing."""

from __future__ import annotations

from collections import deque


class RateCap:
    """At most `limit` takes in any `window_ns`, the window's end excluded. Times are passed in and must not go back."""

    def __init__(self, limit: int, window_ns: int) -> None:
        if limit < 1 or window_ns < 1:
            raise ValueError(f"a rate of {limit} in {window_ns} ns lets nothing through, ever")
        self._window_ns = window_ns
        self._taken: deque[int] = deque(maxlen=limit)

    def take(self, now_ns: int) -> bool:
        """Take one now, if there is one left; whether it was."""
        if self.free_at_ns > now_ns:
            return False
        self._taken.append(now_ns)  # pushes out the oldest, which is out of the window
        return True

    @property
    def free_at_ns(self) -> int:
        """When the next one can be taken; 0 when at any time."""
        if len(self._taken) < (self._taken.maxlen or 0):
            return 0
        return self._taken[0] + self._window_ns
