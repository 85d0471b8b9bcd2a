"""How silence between machines is judged: how often each sends a heartbeat, and `Standstill`.

A process that was frozen itself, as by `docker pause`, has not read meanwhile what the others have sent: their silence
is no evidence until they have had time to send again.
"""

from __future__ import annotations

import time
from typing import Final

import anyio

BEATS: Final = 10
"""Heartbeats, on each side of a connection, within the silence that is allowed."""

_FROZEN_S: Final = 2.0
"""Seconds by which a sleep lasts longer when the process has stood still; a busy machine delays it by less."""


class Standstill:
    """The sleep of a loop that judges silence.

    Args:
        period_s: seconds of each sleep.
        thaw_s: seconds after a standstill in which nothing is to be judged.
    """

    def __init__(self, period_s: float, thaw_s: float) -> None:
        self._period_s, self._thaw_s = period_s, thaw_s
        self._judged_from_s = 0.0

    async def sleep(self) -> None:
        """Sleeps for a period."""
        asleep_s = time.monotonic()
        await anyio.sleep(self._period_s)
        now_s = time.monotonic()
        if now_s - asleep_s > self._period_s + _FROZEN_S:
            self._judged_from_s = now_s + self._thaw_s

    @property
    def is_over(self) -> bool:
        """Whether silence is evidence now."""
        return time.monotonic() >= self._judged_from_s
