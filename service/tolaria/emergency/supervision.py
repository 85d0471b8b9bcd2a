"""The service's side of emergencies: heartbeats, the sentinel process, stack dumps, and watching the board."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import structlog
from anyio.abc import TaskStatus

from tolaria.config import EmergencySettings, Settings
from tolaria.emergency.controller import EmergencyController
from tolaria.errors import BoardLostError
from tolaria.processes import ChildCommand, ChildSupervisor, RestartPolicy
from tolaria.ranks.stacks import STACKS_FILE, dump_on_request
from tolaria.signals import ParticipantWriter, SignalBoard, remove_stale_boards
from tolaria.signals.lane_pulse import LanePulse

COMMAND = (sys.executable, "-m", "tolaria.emergency.sentinel")
_BEAT_S_MAX = 1.0
_BEATS_PER_TIMEOUT = 4
_START_S, _STOP_S, _RETRY_S = 10.0, 2.0, 5.0
_log = structlog.get_logger(__name__)


class Heartbeats(LanePulse):
    """The heartbeats of event loop and lane, on tolaria's block of the board.

    While the lane rests, or runs in a separate process, which is supervised, the event loop beats for it.
    The event loop shows the lane's work on the board with each of its beats, so that a short phase costs the lane
    nothing there.
    """

    def __init__(self, participant: ParticipantWriter, limits: EmergencySettings) -> None:
        super().__init__(participant, limits)
        self._participant = participant

    async def beat(self, interval_s: float) -> None:
        """A task: beats for the event loop, and for the lane while it rests, until cancelled."""
        while True:
            self._participant.beat()
            self.show_work()
            if self.rests:
                self._participant.beat_lane()
            await anyio.sleep(interval_s)


class SentinelProcess(ChildSupervisor):
    """A sentinel that watches this process. It shares this process's standard error."""

    def __init__(
        self,
        board: SignalBoard,
        settings: Settings,
        *,
        command: Sequence[str] = COMMAND,
        retry_s: float = _RETRY_S,
    ) -> None:
        limits = settings.emergency
        arguments = [
            *(f"--board={board.path}", f"--run-id={board.run_id}", f"--service-pid={os.getpid()}"),
            *(f"--heartbeat-timeout-s={limits.heartbeat_timeout_s}", f"--startup-s={limits.startup_allowance_s}"),
            *(f"--grace-s={limits.grace_s}", f"--drain-s={limits.drain_s}"),
            *(f"--stacks={_stacks(settings)}", "--while-stdin"),
        ]
        super().__init__(
            ChildCommand("sentinel", [*command, *arguments]),
            restarts=RestartPolicy(pause_s=retry_s, pause_s_max=retry_s),
            start_timeout_s=_START_S,
            stop_timeout_s=_STOP_S,
        )
        self.attempted = anyio.Event()
        """Set once the first start has succeeded or failed."""

    def accept(self, announcement: Mapping[str, Any]) -> None:
        """Refuses anything but {"watching": this process's id}."""
        if announcement["watching"] != os.getpid():
            raise ValueError("it watches another process")

    def on_started(self) -> None:
        """Notes that it watches."""
        self.attempted.set()

    def on_ended(self, detail: str, restart_in_s: float) -> None:
        """Logs that no sentinel watches until the restart; training goes on."""
        self.attempted.set()
        _log.error("sentinel_lost", detail=detail, restart_in_s=restart_in_s)


async def watch_process(
    settings: Settings,
    board: SignalBoard,
    heartbeats: Heartbeats,
    *,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """A task: beats, and keeps a sentinel running if the settings ask for one, until cancelled.

    It counts as started once the sentinel's first start has succeeded or failed. First removes the boards that crashed
    runs left beside this one.
    """
    timeout_s = settings.emergency.heartbeat_timeout_s
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(heartbeats.beat, min(_BEAT_S_MAX, timeout_s / _BEATS_PER_TIMEOUT))
        tasks.start_soon(_remove_stale_boards, board.path)
        if settings.emergency.sentinel:
            sentinel = SentinelProcess(board, settings)
            tasks.start_soon(sentinel.run)
            await sentinel.attempted.wait()
        task_status.started()


async def _remove_stale_boards(beside: Path) -> None:
    for path in await anyio.to_thread.run_sync(remove_stale_boards, beside):
        _log.info("stale_board_removed", board=str(path))


async def watch_board(board: SignalBoard, controller: EmergencyController, *, interval_s: float = 0.25) -> None:
    """A task: passes what peers write to the board to `controller` as soon as the bell rings, until cancelled.

    Waits in one worker thread, without the GIL, at most `interval_s` at a time; a ring arrives within tens of
    microseconds. Once the board is lost, due work is still done every `interval_s`.
    """
    limiter = anyio.CapacityLimiter(1)
    seen = 0
    while True:
        with suppress(BoardLostError):  # waiting for it raises as well
            seen = board.bell  # before reading, so that a later write ends the wait
        controller.observe_board()
        controller.pump()
        due_in_s = controller.due_in_s
        timeout_s = interval_s if due_in_s is None else min(interval_s, due_in_s)
        try:
            await anyio.to_thread.run_sync(board.wait, seen, timeout_s, abandon_on_cancel=True, limiter=limiter)
        except BoardLostError:
            await anyio.sleep(timeout_s)


@contextmanager
def stacks_on_request() -> Iterator[None]:
    """While the block runs, this process dumps its stacks when the sentinel asks for them. For the main thread.

    Without memory files, which Linux has, it does not.
    """
    end = dump_on_request() if hasattr(os, "memfd_create") else None
    try:
        yield
    finally:
        if end is not None:
            end()


def _stacks(settings: Settings) -> Path:
    return Path(settings.state.dir) / STACKS_FILE
