"""Who waits for which command at a fence. The event loop's side of the lane's mailbox.

Owns tickets. Must not know what commands do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from tolaria.errors import LaneError, LaneStoppedError
from tolaria.training.fences import FenceReport, LaneCommand

_KEYS_MAX = 256

OnDone = Callable[[FenceReport], None]


@dataclass(slots=True)
class _Waiting:
    event: anyio.Event
    report: FenceReport | None = None


class FenceDesk:
    """Gives commands to the lane and their results to whoever asked. Used on the event loop only.

    Args:
        post: hands a ticket and a command to the lane.
    """

    def __init__(self, post: Callable[[int, LaneCommand], None]) -> None:
        self._post = post
        self._next_ticket = 1
        self._on_done: dict[int, OnDone] = {}
        self._by_key: OrderedDict[str, _Waiting] = OrderedDict()
        self._closed = False

    def post(self, command: LaneCommand, on_done: OnDone) -> None:
        """Have `command` carried out at the next fence and `on_done` called with what came of it."""
        if self._closed:
            return
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._on_done[ticket] = on_done
        try:
            self._post(ticket, command)
        except LaneError as error:  # too many wait already
            self.take(FenceReport(ticket, 0, None, error))

    async def carry_out(
        self, command: LaneCommand, *, key: str = "", on_done: OnDone = lambda _report: None
    ) -> FenceReport:
        """Have `command` carried out at the next fence and wait for it.

        With a `key` it is carried out once, however often it is asked for: a caller who went away may come again, and
        `on_done` is called though nobody waits any more.

        Raises:
            TolariaError: why it was refused; nothing has changed then.
            LaneStoppedError: when the run has ended before.
        """
        waiting = self._by_key.get(key) if key else None
        if waiting is None:
            waiting = self._ask(command, key, on_done)
        if not self._closed:
            await waiting.event.wait()
        if waiting.report is None:
            raise LaneStoppedError("the run has ended; there will be no further fence")
        if waiting.report.error is not None:
            raise waiting.report.error
        return waiting.report

    def _ask(self, command: LaneCommand, key: str, on_done: OnDone) -> _Waiting:
        waiting = _Waiting(anyio.Event())
        if key:
            self._by_key[key] = waiting
            while len(self._by_key) > _KEYS_MAX:
                self._by_key.popitem(last=False)

        def done(report: FenceReport) -> None:
            waiting.report = report
            waiting.event.set()
            on_done(report)

        self.post(command, done)
        return waiting

    def take(self, report: FenceReport) -> None:
        """The lane has answered."""
        on_done = self._on_done.pop(report.ticket, None)
        if on_done is not None:
            on_done(report)

    def close(self) -> None:
        """There will be no further fence: whoever waits is told."""
        self._closed = True
        left, self._on_done = self._on_done, {}
        for ticket, on_done in left.items():
            on_done(FenceReport(ticket, 0, None, LaneStoppedError("the run has ended before the next fence")))
