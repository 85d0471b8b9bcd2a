"""Tells everyone who waits that something about the run has changed. Holds no data: they look for themselves."""

from __future__ import annotations

from collections.abc import Callable

import anyio


class StatusFeed:
    """An event that can happen many times. Used on the event loop only."""

    def __init__(self) -> None:
        self._change = anyio.Event()
        self.version = 0

    def changed(self) -> None:
        """Wake everyone who waits now."""
        self.version += 1
        self._change.set()
        self._change = anyio.Event()

    async def next(self) -> None:
        """Wait for the next change."""
        await self._change.wait()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds` after a change, or return at once if it does already."""
        while not holds():
            await self._change.wait()
