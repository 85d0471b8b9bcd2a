"""The lane's part in profiles: begins a window at a fence, counts its steps, hands the trace over.

Used in the lane's thread alone, since torch profiles the thread that began. Must not know who asked for a profile, nor
when one is due.

What is marked: forward, backward, merge, optimizer within a step; boundary around the evaluation at an epoch's end and
around the wait for what the event loop orders next; rollback around a restore.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

from tolaria.errors import RequestError
from tolaria.telemetry.profiler import ProfileWindow
from tolaria.training.fences import CaptureProfile, FenceReport, ProfileBegun
from tolaria.training.reports import ProfileEnded
from tolaria.values.profiling import Region

Mark: TypeAlias = Callable[[Region], AbstractContextManager[object]]
"""Marks what runs in a block, in the trace of a window that is open."""


def unmarked(name: Region) -> AbstractContextManager[object]:
    """The mark of who takes no traces."""
    del name
    return nullcontext()


class LaneProfiler:
    """The window of one lane.

    Args:
        window: nobody else's.
        resting: around what may take long: a second when the profiler is first begun, more when a trace is written.
    """

    def __init__(self, window: ProfileWindow, *, resting: Callable[[], AbstractContextManager[None]]) -> None:
        self._window = window
        self._resting = resting
        self.mark: Mark = window.region

    def carry_out(self, ticket: int, command: CaptureProfile, global_step: int) -> FenceReport:
        """Profile the next steps from this fence on, unless a window is open or the profiler cannot be begun."""
        try:
            with self._resting():
                failed = self._window.begin(command.steps)
        except RequestError as error:
            return FenceReport(ticket, global_step, None, error)
        return FenceReport(ticket, global_step, failed or ProfileBegun(command.steps), None)

    def step_done(self, global_step: int) -> ProfileEnded | None:
        """A step is done; if it was the window's last, what came of it. Nothing, and at once, without a window."""
        if not self._window.open:
            return None
        with self._resting():
            outcome = self._window.step()
        return None if outcome is None else ProfileEnded(global_step, outcome)

    def abandon(self) -> None:
        """There will be no further step: an open window ends without a trace."""
        self._window.abandon()
