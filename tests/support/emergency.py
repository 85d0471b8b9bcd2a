"""An emergency controller on a real board, with a peer's view of the board and a record of all reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tolaria.emergency import EmergencyController, Notice, Report
from tolaria.errors import BroadcastFailedError
from tolaria.signals import SignalBoard

R = TypeVar("R")
S = 1_000_000_000
BROADCASTS_PER_MINUTE = 60


class Clock:
    """Monotonic nanoseconds that advance by one at each call, and by what a test adds."""

    def __init__(self) -> None:
        self.now_ns = 1000 * S

    def __call__(self) -> int:
        self.now_ns += 1
        return self.now_ns


class ControllerHarness:
    """One controller, its reports and broadcasts, and a peer's view of its board.

    `broadcast_error`: why broadcasts fail; empty if they succeed. `on_report`: called with each report; may act on the
    controller.
    """

    def __init__(self, path: Path, broadcasts_per_minute: int = BROADCASTS_PER_MINUTE) -> None:
        self.clock = Clock()
        self.broadcast_error = ""
        self.broadcasts: list[Notice] = []
        self.reports: list[Report] = []
        self.on_report: Callable[[Report], None] = lambda _: None
        self.board = SignalBoard.create(path, "run-1", clock=self.clock)
        self.participant = self.board.claim("tolaria")
        self.peer_board = SignalBoard.attach(path, "run-1", clock=self.clock)
        self.controller = EmergencyController(
            self.board,
            self.participant,
            broadcast=self._broadcast,
            observer=self._observe,
            broadcasts_per_minute=broadcasts_per_minute,
            clock=self.clock,
        )

    @property
    def sent(self) -> int:
        """Signals broadcast."""
        return sum(notice.count for notice in self.broadcasts)

    def reports_of(self, kind: type[R]) -> list[R]:
        """The reports of one kind, in order."""
        return [report for report in self.reports if isinstance(report, kind)]

    def close(self) -> None:
        """Removes the board."""
        self.peer_board.close()
        self.board.close(unlink=True)

    def _broadcast(self, notice: Notice) -> None:
        if self.broadcast_error:
            raise BroadcastFailedError(self.broadcast_error)
        self.broadcasts.append(notice)

    def _observe(self, report: Report) -> None:
        self.reports.append(report)
        self.on_report(report)
