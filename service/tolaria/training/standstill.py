"""Holds the lane for as long as anybody wants it to stand. Must not know why they do.

Owns the numbers of orders to stand.
"""

from __future__ import annotations

from collections.abc import Callable

import anyio


class Standstill:
    """Used on the event loop only.

    Args:
        hold: makes the lane stand; told the order's number, with which the lane answers.
        release: lets it go on.
    """

    def __init__(self, hold: Callable[[int], None], release: Callable[[], None]) -> None:
        self._hold = hold
        self._release = release
        self._wanted: set[str] = set()
        self._number = 0
        self.held = anyio.Event()
        """Set once the lane stands; another one for every time that it is made to."""

    @property
    def standing(self) -> bool:
        """Whether the lane stands now, by order."""
        return bool(self._wanted) and self.held.is_set()

    def wanted_by(self, who: str) -> bool:
        """Whether this one wants it to stand."""
        return who in self._wanted

    def others_than(self, who: str) -> bool:
        """Whether anybody else wants it to stand."""
        return bool(self._wanted - {who})

    def want(self, who: str) -> None:
        """Have it stand."""
        if not self._wanted:
            self.held = anyio.Event()
            self._number += 1
            self._hold(self._number)
        self._wanted.add(who)

    def let_go(self, who: str) -> None:
        """As far as this one is concerned it may go on; it does when nobody else wants it to stand."""
        if who in self._wanted:
            self._wanted.discard(who)
            if not self._wanted:
                self._release()

    def answered(self, number: int) -> bool:
        """The lane stands, by the order of this number; whether that is the last one."""
        if number == self._number:
            self.held.set()
        return number == self._number
