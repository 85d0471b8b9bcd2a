"""The heartbeats of event loop and lane, as the sentinel reads them.

Owns who beats for whom: the lane beats for itself while it works. Where it has nothing to do, or is held, it says so
and waits on a lock; then the event loop beats for it. So a lane that is stuck at work, or a loop that is stuck
anywhere, falls silent, and a lane at rest does not. Must not know what either does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from tolaria.signals import Participant


class Heartbeats:
    """Both hearts of the service, on tolaria's block of the board."""

    def __init__(self, participant: Participant) -> None:
        self._participant = participant
        self._lane_rests = True  # until the lane first says that it works: there may be none yet

    def lane_beat(self) -> None:
        """The lane has got on; between microbatches, from the lane's thread. Under a microsecond."""
        self._participant.beat_lane()

    @contextmanager
    def lane_works(self) -> Iterator[None]:
        """From the lane's thread, around an epoch: it beats for itself."""
        self._participant.beat_lane()
        self._lane_rests = False
        try:
            yield
        finally:
            self._lane_rests = True

    @contextmanager
    def lane_rests(self) -> Iterator[None]:
        """From the lane's thread, around a wait on its mailbox or known to be long: the event loop beats for it."""
        before, self._lane_rests = self._lane_rests, True
        try:
            yield
        finally:
            self._participant.beat_lane()  # before: the time at rest must not count as silence
            self._lane_rests = before

    async def beat(self, interval_s: float) -> None:
        """The event loop's beat, and the lane's while it rests; a task, until cancelled."""
        while True:
            self._participant.beat()
            if self._lane_rests:
                self._participant.beat_lane()
            await anyio.sleep(interval_s)
