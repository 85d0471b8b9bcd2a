"""The service's side of emergencies: heartbeats, the sentinel process, stack dumps, and watching the board."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import structlog
from anyio.abc import TaskStatus

from tolaria.config import EmergencySettings, Settings
from tolaria.emergency.controller import EmergencyController
from tolaria.emergency.sentinel import DUMP_SIGNAL, open_to_append
from tolaria.errors import BoardLostError, ConfigurationError
from tolaria.processes import ChildCommand, ChildSupervisor, RestartPolicy
from tolaria.signals import ParticipantWriter, SignalBoard, remove_stale_boards
from tolaria.signals.layout import LanePhase, LaneWork

COMMAND = (sys.executable, "-m", "tolaria.emergency.sentinel")
_BEAT_S_MAX = 1.0
_BEATS_PER_TIMEOUT = 4
_LOADING_S = 1.0
_SHORT_S = 0.01
_STEPS_OF_SILENCE = 10
_START_S, _STOP_S, _RETRY_S = 10.0, 2.0, 5.0
_log = structlog.get_logger(__name__)


class _PhaseSpan:
    """A phase while its block runs, then the phase before."""

    __slots__ = ("_before", "_heartbeats", "_phase")

    def __init__(self, heartbeats: Heartbeats, phase: LanePhase) -> None:
        self._heartbeats = heartbeats
        self._phase = self._before = phase

    def __enter__(self) -> None:
        self._before = self._heartbeats.enter_phase(self._phase)

    def __exit__(self, *_: object) -> None:
        self._heartbeats.enter_phase(self._before)


class Heartbeats:
    """The heartbeats of event loop and lane, on tolaria's block of the board.

    The lane beats for itself while it works; while it is idle or paused, the event loop beats for it. So a lane that
    hangs during work is silent, but an idle one is not. How long it may be silent depends on its phase and its steps;
    the event loop shows that on the board with each of its beats, so that a short phase costs the lane nothing there.
    """

    def __init__(self, participant: ParticipantWriter, limits: EmergencySettings) -> None:
        self._participant = participant
        self._lane_rests = True
        self._phase, self._since_s = LanePhase.STEPPING, time.monotonic()
        long, usual = int(limits.phase_timeout_s * 1000), int(limits.heartbeat_timeout_s * 1000)
        self._silence_ms = dict.fromkeys(LanePhase, max(long, usual)) | {LanePhase.STEPPING: usual}
        self._words = {phase: LaneWork(phase, ms).word for phase, ms in self._silence_ms.items()}
        self.show_work()

    def phase(self) -> tuple[str, float]:
        """Returns what the lane does other than steps, and for how many seconds; an empty text if it is stepping.

        Called from any thread. The short waits for data between microbatches are part of a step.
        """
        phase, seconds = self._phase, time.monotonic() - self._since_s
        stepping = phase is LanePhase.STEPPING or (phase is LanePhase.LOADING and seconds < _LOADING_S)
        return ("", 0.0) if stepping else (phase.name.lower(), seconds)

    def lane_beat(self) -> None:
        """Beats for the lane; called from its thread between microbatches. Takes less than a microsecond."""
        self._participant.beat_lane()

    def lane_step(self, duration_s: float) -> None:
        """Records the duration of an ordinary step: ten times the longest one is no silence."""
        ms = int(duration_s * 1000 * _STEPS_OF_SILENCE)
        if ms > self._silence_ms[LanePhase.STEPPING]:
            self._silence_ms[LanePhase.STEPPING] = ms
            self._words[LanePhase.STEPPING] = LaneWork(LanePhase.STEPPING, ms).word

    def lane_phase(self, phase: LanePhase) -> AbstractContextManager[None]:
        """Returns the context of a block of the lane's work, in which another silence is permitted. Nests."""
        return _PhaseSpan(self, phase)

    def enter_phase(self, phase: LanePhase) -> LanePhase:
        """Begins a phase and returns the one before. Called from the lane's thread."""
        now_s = time.monotonic()
        if now_s - self._since_s >= _SHORT_S:
            self._participant.beat_lane()  # first, so that silence permitted before does not count now
        before, self._phase, self._since_s = self._phase, phase, now_s
        return before

    def show_work(self) -> None:
        """Shows on the board what the lane does, and for how long it may be silent meanwhile."""
        self._participant.show_lane_work(self._words[self._phase])

    @contextmanager
    def lane_works(self) -> Iterator[None]:
        """Entered by the lane's thread around an epoch, in which the lane beats for itself."""
        self._participant.beat_lane()
        self._lane_rests = False
        try:
            yield
        finally:
            self._lane_rests = True

    @contextmanager
    def lane_rests(self) -> Iterator[None]:
        """Entered by the lane's thread around a wait or a long operation, in which the event loop beats for it."""
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
            self.show_work()
            if self._lane_rests:
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
def stacks_on_request(settings: Settings) -> Iterator[None]:
    """While the block runs, SIGUSR1 appends the stacks of all threads to a file in state.dir. For the main thread.

    A handler in C writes the dump without the GIL, so it shows the thread that holds the GIL. Raises
    `ConfigurationError` when that file cannot be opened.
    """
    path = _stacks(settings)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = open_to_append(path)
    except OSError as error:
        raise ConfigurationError([f"state.dir: {error}"]) from None
    try:
        # Unregistering restores this: a late request must not end the process, the default action of SIGUSR1.
        signal.signal(DUMP_SIGNAL, signal.SIG_IGN)
        faulthandler.register(DUMP_SIGNAL, fd, all_threads=True, chain=False)
        yield
    finally:
        faulthandler.unregister(DUMP_SIGNAL)
        os.close(fd)


def _stacks(settings: Settings) -> Path:
    return Path(settings.state.dir) / "stacks.txt"
