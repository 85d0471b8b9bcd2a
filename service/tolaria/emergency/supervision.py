"""The service's side of emergencies: heartbeats, the sentinel process, stack dumps, and watching the board."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import structlog

from tolaria.config import Settings
from tolaria.emergency.controller import EmergencyController
from tolaria.emergency.sentinel import DUMP_SIGNAL
from tolaria.errors import BoardLostError, ConfigurationError
from tolaria.processes import ChildCommand, ChildSupervisor, RestartPolicy
from tolaria.signals import Participant, SignalBoard, remove_stale_boards

COMMAND = (sys.executable, "-m", "tolaria.emergency.sentinel")
_BEAT_S_MAX = 1.0
_BEATS_PER_TIMEOUT = 4
_RETRY_S = 5.0
_log = structlog.get_logger(__name__)


class Heartbeats:
    """The heartbeats of event loop and lane, on tolaria's block of the board.

    The lane beats for itself while it works; while it is idle or paused, the event loop beats for it. So a lane that
    hangs at work, or a hanging loop, is silent, and an idle lane is not.
    """

    def __init__(self, participant: Participant) -> None:
        self._participant = participant
        self._lane_rests = True

    def lane_beat(self) -> None:
        """Beats for the lane; called from its thread between microbatches. Under a microsecond."""
        self._participant.beat_lane()

    @contextmanager
    def lane_works(self) -> Iterator[None]:
        """From the lane's thread, around an epoch: the lane beats for itself."""
        self._participant.beat_lane()
        self._lane_rests = False
        try:
            yield
        finally:
            self._lane_rests = True

    @contextmanager
    def lane_rests(self) -> Iterator[None]:
        """From the lane's thread, around a wait or a long operation: the event loop beats for it."""
        before, self._lane_rests = self._lane_rests, True
        try:
            yield
        finally:
            self._participant.beat_lane()  # first, so that the time at rest does not count as silence
            self._lane_rests = before

    async def beat(self, interval_s: float) -> None:
        """A task: beats for the event loop, and for the lane while it rests, until cancelled."""
        while True:
            self._participant.beat()
            if self._lane_rests:
                self._participant.beat_lane()
            await anyio.sleep(interval_s)


@dataclass(frozen=True, slots=True)
class SentinelOptions:
    """What a sentinel of this process watches; seconds as in `SilenceLimits`."""

    board: Path
    run_id: str
    stacks: Path
    heartbeat_timeout_s: float
    startup_s: float
    grace_s: float
    drain_s: float

    def arguments(self) -> list[str]:
        """Returns the sentinel's command line."""
        return [
            *(f"--board={self.board}", f"--run-id={self.run_id}", "--service-pid", str(os.getpid())),
            *("--heartbeat-timeout-s", str(self.heartbeat_timeout_s), "--startup-s", str(self.startup_s)),
            *("--grace-s", str(self.grace_s), "--drain-s", str(self.drain_s)),
            *(f"--stacks={self.stacks}", "--while-stdin"),
        ]


class SentinelProcess(ChildSupervisor):
    """A sentinel that watches this process. Its standard error is this process's own."""

    def __init__(
        self,
        options: SentinelOptions,
        *,
        command: Sequence[str] = COMMAND,
        start_timeout_s: float = 10.0,
        stop_timeout_s: float = 2.0,
        retry_s: float = _RETRY_S,
    ) -> None:
        super().__init__(
            ChildCommand("sentinel", [*command, *options.arguments()]),
            restarts=RestartPolicy(pause_s=retry_s, pause_s_max=retry_s),
            start_timeout_s=start_timeout_s,
            stop_timeout_s=stop_timeout_s,
        )

    def accept(self, announcement: Mapping[str, Any]) -> None:
        """Requires {"watching": this process's id}."""
        if announcement["watching"] != os.getpid():
            raise ValueError("it watches another process")

    def on_ended(self, detail: str, restart_in_s: float) -> None:
        """Logs that no sentinel watches until the restart; training goes on."""
        _log.error("sentinel_lost", detail=detail, restart_in_s=restart_in_s)


async def watch_process(settings: Settings, board: SignalBoard, heartbeats: Heartbeats) -> None:
    """A task: beats, and keeps a sentinel running if the settings ask for one, until cancelled.

    Removes the boards that crashed runs left beside this one first.
    """
    emergency = settings.emergency
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(heartbeats.beat, min(_BEAT_S_MAX, emergency.heartbeat_timeout_s / _BEATS_PER_TIMEOUT))
        tasks.start_soon(_remove_stale_boards, board.path)
        if emergency.sentinel:
            options = SentinelOptions(
                board=board.path,
                run_id=board.run_id,
                stacks=_stacks(settings),
                heartbeat_timeout_s=emergency.heartbeat_timeout_s,
                startup_s=emergency.startup_allowance_s,
                grace_s=emergency.grace_s,
                drain_s=emergency.drain_s,
            )
            await SentinelProcess(options).run()


async def _remove_stale_boards(beside: Path) -> None:
    for path in await anyio.to_thread.run_sync(remove_stale_boards, beside):
        _log.info("stale_board_removed", board=str(path))


async def watch_board(board: SignalBoard, controller: EmergencyController, *, interval_s: float = 0.25) -> None:
    """A task: passes what peers write to the board to `controller` as soon as the bell rings, until cancelled.

    Waits in one worker thread, without the GIL, at most `interval_s` at a time; a ring arrives within tens of
    microseconds. Once the board is lost it still does what is due, every `interval_s`.
    """
    limiter = anyio.CapacityLimiter(1)
    while True:
        try:
            seen = board.bell  # before reading, so that a later write ends the wait
        except BoardLostError:
            seen = None
        controller.observe_board()
        controller.pump()
        due_in_s = controller.due_in_s
        timeout_s = interval_s if due_in_s is None else min(interval_s, due_in_s)
        if seen is None:
            await anyio.sleep(timeout_s)
        else:
            await _wait(board, seen, timeout_s, limiter)


async def _wait(board: SignalBoard, seen: int, timeout_s: float, limiter: anyio.CapacityLimiter) -> None:
    try:
        await anyio.to_thread.run_sync(board.wait, seen, timeout_s, abandon_on_cancel=True, limiter=limiter)
    except BoardLostError:
        await anyio.sleep(timeout_s)


@contextmanager
def stacks_on_request(settings: Settings) -> Iterator[None]:
    """While the block runs, SIGUSR1 dumps the stacks of all threads to a file in state.dir. For the main thread.

    Raises:
        ConfigurationError: that file cannot be opened.
    """
    path = _stacks(settings)
    with ExitStack() as stack:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(register_stack_dump(path))
        except OSError as error:
            raise ConfigurationError([f"state.dir: {error}"]) from None
        yield


@contextmanager
def register_stack_dump(path: Path) -> Iterator[None]:
    """While the block runs, SIGUSR1 appends the stacks of all threads to `path` (mode 0600). For the main thread.

    A handler in C writes the dump without the GIL, so it shows the thread that holds it. Raises OSError when the file
    cannot be opened.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        # Unregistering restores this: a late request must not end the process, the default action of SIGUSR1.
        signal.signal(DUMP_SIGNAL, signal.SIG_IGN)
        faulthandler.register(DUMP_SIGNAL, fd, all_threads=True, chain=False)
        try:
            yield
        finally:
            faulthandler.unregister(DUMP_SIGNAL)
    finally:
        os.close(fd)


def _stacks(settings: Settings) -> Path:
    return Path(settings.state.dir) / "stacks.txt"
