from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT, EMERGENCY_LEVEL_NOTICE
from tolaria.emergency import (
    BoardUnreadable,
    DeadlineMissed,
    EmergencyController,
    EmergencyPolicy,
    Escalated,
    Notice,
    Report,
)
from tolaria.emergency.watching import watch_board
from tolaria.errors import BroadcastFailedError
from tolaria.signals import SignalBoard

pytestmark = pytest.mark.anyio
NEVER_S = 60.0


class Watched:
    """A controller on the real clock; each report wakes whoever waits for one of its kind."""

    def __init__(self, path: Path) -> None:
        self.board = SignalBoard.create(path, "run-1")
        self.other = SignalBoard.attach(path, "run-1")
        self.failures_left = 0
        self.told: list[Notice] = []
        self.seen: dict[type[object], anyio.Event] = {}
        self.controller = EmergencyController(
            self.board,
            self.board.claim("tolaria"),
            broadcast=self._broadcast,
            observer=self._observe,
            policy=EmergencyPolicy(retry_s=0.05),
        )

    async def until(self, kind: type[object]) -> None:
        with anyio.fail_after(30):
            await self.seen.setdefault(kind, anyio.Event()).wait()

    def _broadcast(self, notice: Notice) -> None:
        if self.failures_left:
            self.failures_left -= 1
            raise BroadcastFailedError("down")
        self.told.append(notice)

    def _observe(self, report: Report) -> None:
        self.seen.setdefault(type(report), anyio.Event()).set()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    """On a board of its own."""
    watched = Watched(tmp_path / "board")
    yield watched
    watched.other.close()
    watched.board.close(unlink=True)


async def test_a_peers_signal_wakes_the_watcher(watched: Watched) -> None:
    """Long before the watcher would look by itself."""
    kasmina = watched.other.claim("kasmina")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: watch_board(watched.board, watched.controller, interval_s=NEVER_S))
        await anyio.lowlevel.checkpoint()
        kasmina.raise_level(EMERGENCY_LEVEL_HALT, "burning")
        await watched.until(Escalated)
        tasks.cancel_scope.cancel()
    assert watched.controller.state.reason == "burning"


async def test_what_is_due_is_done_in_time(watched: Watched) -> None:
    """A deadline is noticed and a failed broadcast tried again, though nobody rings."""
    watched.failures_left = 1
    watched.controller.escalate(EMERGENCY_LEVEL_HALT, "why", "judge")
    began_s = time.monotonic()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: watch_board(watched.board, watched.controller, interval_s=NEVER_S))
        await watched.until(DeadlineMissed)
        with anyio.fail_after(30):
            while not watched.told:
                await anyio.sleep(0.005)
        tasks.cancel_scope.cancel()
    assert time.monotonic() - began_s < NEVER_S / 10


async def test_a_board_that_is_lost_ends_no_watching(watched: Watched) -> None:
    """It is told, and what waits for telemetry is still told."""
    watched.failures_left = 1
    watched.controller.escalate(EMERGENCY_LEVEL_NOTICE, "why", "judge")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: watch_board(watched.board, watched.controller, interval_s=0.01))
        await anyio.lowlevel.checkpoint()
        watched.board.close()
        await watched.until(BoardUnreadable)
        with anyio.fail_after(30):
            while not watched.told:
                await anyio.sleep(0.005)
        tasks.cancel_scope.cancel()
