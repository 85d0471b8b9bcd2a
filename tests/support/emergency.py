"""An emergency controller on a real board, a peer's view of that board, and everything that is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tolaria.emergency import EmergencyController, EmergencyPolicy, Notice, Report
from tolaria.errors import BroadcastFailedError
from tolaria.signals import SignalBoard

R = TypeVar("R")
S = 1_000_000_000


class Clock:
    """Monotonic nanoseconds that move by one at each look, and by what a test adds."""

    def __init__(self) -> None:
        self.now_ns = 1000 * S

    def __call__(self) -> int:
        self.now_ns += 1
        return self.now_ns


class Stage:
    """One controller, what it has told, and a peer on the same board.

    `broken`: why broadcasts fail; empty: they do not. `react` is called with each report, as an observer that acts.
    """

    def __init__(self, path: Path, policy: EmergencyPolicy | None = None) -> None:
        self.clock = Clock()
        self.path = path
        self.broken = ""
        self.told: list[Notice] = []
        self.reports: list[Report] = []
        self.react: Callable[[Report], None] = lambda _: None
        self.board = SignalBoard.create(path, "run-1", clock=self.clock)
        self.participant = self.board.claim("tolaria")
        self.other = SignalBoard.attach(path, "run-1", clock=self.clock)
        self.controller = EmergencyController(
            self.board,
            self.participant,
            broadcast=self._broadcast,
            observer=self._observe,
            policy=policy,
            clock=self.clock,
        )

    def reports_of(self, kind: type[R]) -> list[R]:
        """The reports of one kind, in order."""
        return [report for report in self.reports if isinstance(report, kind)]

    def close(self) -> None:
        """Take the board away."""
        self.other.close()
        self.board.close(unlink=True)

    def _broadcast(self, notice: Notice) -> None:
        if self.broken:
            raise BroadcastFailedError(self.broken)
        self.told.append(notice)

    def _observe(self, report: Report) -> None:
        self.reports.append(report)
        self.react(report)
