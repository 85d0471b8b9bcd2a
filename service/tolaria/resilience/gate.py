"""A gate before one peer: how many calls may be in flight to it, how many may wait, and an end to both.

Owns the places and the waiting for them. Must not know what calls are, what they ask, or how they end.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from tolaria.errors import CallRefusedError


class CallGate:
    """Places for calls in flight to `peer`. Whoever finds none waits, first come first served. Event loop only.

    Args:
        peer: its name, for errors.
        in_flight_max: places, 1 or more.
        waiting_max: calls that may wait for one; 0: none waits.
    """

    def __init__(self, peer: str, *, in_flight_max: int, waiting_max: int) -> None:
        self._peer = peer
        self._in_flight_max, self._waiting_max = in_flight_max, waiting_max
        self._places = anyio.Semaphore(in_flight_max, max_value=in_flight_max, fast_acquire=True)
        self._closing = False
        self._ended = anyio.Event()
        self.in_flight = 0
        """Calls that have a place now."""

    @asynccontextmanager
    async def place(self, name: str, timeout_s: float) -> AsyncIterator[None]:
        """Hold a place for the call `name` while the block runs, waiting for it at most `timeout_s`.

        Raises:
            CallRefusedError: when too many wait already, none came free in time, or the gate has been closed.
        """
        self._refuse_if_closing(name)
        if self._places.value == 0:
            await self._wait(name, timeout_s)
        else:
            self._places.acquire_nowait()
        try:
            self._refuse_if_closing(name)  # it may have been closed meanwhile
            self.in_flight += 1
            try:
                yield
            finally:
                self.in_flight -= 1
                ended, self._ended = self._ended, anyio.Event()
                ended.set()
        finally:
            self._places.release()

    async def drain(self, timeout_s: float) -> None:
        """Close the gate for good and wait until nothing is in flight, at most `timeout_s`. Who waits is refused."""
        self._closing = True
        with anyio.move_on_after(timeout_s):
            while self.in_flight:
                await self._ended.wait()

    def _refuse_if_closing(self, name: str) -> None:
        if self._closing:
            raise CallRefusedError(self._peer, f"{name} refused: the channel is closing")

    async def _wait(self, name: str, timeout_s: float) -> None:
        if self._places.statistics().tasks_waiting >= self._waiting_max:
            detail = f"{self._in_flight_max} calls are in flight and {self._waiting_max} wait, which is the most"
            raise CallRefusedError(self._peer, f"{name} refused: {detail}")
        with anyio.move_on_after(timeout_s) as scope:
            await self._places.acquire()
        if scope.cancelled_caught:
            detail = f"none of {self._in_flight_max} calls in flight ended within {timeout_s * 1000:.0f} ms"
            raise CallRefusedError(self._peer, f"{name} refused: {detail}")
