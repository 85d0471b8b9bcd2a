from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from structlog.testing import capture_logs

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT, EMERGENCY_LEVEL_NOTICE
from support.emergency import ControllerHarness
from support.processes import is_alive
from tolaria.config import EmergencySettings, Settings, load_settings
from tolaria.emergency import (
    BoardUnreadable,
    DeadlineMissed,
    EmergencyController,
    Escalated,
    Notice,
    Report,
)
from tolaria.emergency.supervision import (
    Heartbeats,
    SentinelProcess,
    watch_board,
    watch_process,
)
from tolaria.errors import BroadcastFailedError, ChildFailedError
from tolaria.processes import supervised
from tolaria.ranks.stacks import STACKS_SIGNAL, stacks_of, summary
from tolaria.signals import SignalBoard, mapping
from tolaria.signals.layout import LanePhase

pytestmark = pytest.mark.anyio
TIMEOUT_S = 180.0
NEVER_S = 600.0


@pytest.fixture
def board(tmp_path: Path) -> Iterator[SignalBoard]:
    """The board of this process; its run id begins like an option."""
    with SignalBoard.create(tmp_path / "tolaria-run-2", "-run") as board:
        yield board


# -- heartbeats --------------------------------------------------------------------------------------------------------


def heartbeats_of(harness: ControllerHarness) -> tuple[int, int]:
    """The loop's and the lane's heartbeat as a peer reads them."""
    state = harness.peer_board.read("tolaria")
    return state.heartbeat_ns, state.lane_heartbeat_ns


async def changes(harness: ControllerHarness) -> tuple[bool, bool]:
    """Whether each heartbeat changed after three more beats of the loop."""
    before = after = heartbeats_of(harness)
    seen = {before[0]}
    while len(seen) < 4:
        await anyio.sleep(0.001)
        after = heartbeats_of(harness)
        seen.add(after[0])
    return after[0] != before[0], after[1] != before[1]


async def test_the_loop_beats_for_an_idle_lane(harness: ControllerHarness) -> None:
    """Before the lane starts, between epochs and while it is paused; not while it works."""
    heartbeats = Heartbeats(harness.participant, EmergencySettings())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(heartbeats.beat, 0.001)
        assert await changes(harness) == (True, True)
        with heartbeats.lane_works():
            assert await changes(harness) == (True, False)
            with heartbeats.lane_rests():
                assert await changes(harness) == (True, True)
            assert await changes(harness) == (True, False)
        assert await changes(harness) == (True, True)
        tasks.cancel_scope.cancel()


async def test_the_lane_beats_from_its_thread(harness: ControllerHarness) -> None:
    """Also when the event loop does not beat."""
    heartbeats = Heartbeats(harness.participant, EmergencySettings())
    before = heartbeats_of(harness)
    thread = threading.Thread(target=heartbeats.lane_beat)
    thread.start()
    thread.join()
    after = heartbeats_of(harness)
    assert (after[0] == before[0], after[1] > before[1]) == (True, True)


async def test_work_begins_with_a_beat(harness: ControllerHarness) -> None:
    """At its start and after a rest, so that the idle time does not count as silence."""
    heartbeats = Heartbeats(harness.participant, EmergencySettings())
    first = heartbeats_of(harness)[1]
    with heartbeats.lane_works():
        second = heartbeats_of(harness)[1]
        with heartbeats.lane_rests():
            pass
        assert first < second < heartbeats_of(harness)[1]


# -- the lane's work ---------------------------------------------------------------------------------------------------

LIMITS = EmergencySettings(heartbeat_timeout_s=30, phase_timeout_s=600)


def permitted(harness: ControllerHarness, heartbeats: Heartbeats) -> tuple[int, float]:
    """The lane's phase on the board with the loop's next beat, and the silence in seconds that it permits."""
    heartbeats.show_work()
    work = harness.peer_board.read("tolaria").lane_work
    return work.phase, work.silence_ms / 1000


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic time of phases, in its only element."""
    now_s = [100.0]
    monkeypatch.setattr("tolaria.signals.lane_pulse.time.monotonic", lambda: now_s[0])
    return now_s


@pytest.mark.parametrize("phase", [phase for phase in LanePhase if phase])
async def test_a_phase_permits_a_longer_silence(
    harness: ControllerHarness, phase: LanePhase, seconds: list[float]
) -> None:
    """While its block runs, nested or not; a long one ends with a beat, so that it does not count as silence after."""
    heartbeats = Heartbeats(harness.participant, LIMITS)
    with heartbeats.lane_works():
        assert permitted(harness, heartbeats) == (LanePhase.STEPPING, 30)
        with heartbeats.lane_phase(phase):
            assert permitted(harness, heartbeats) == (phase, 600)
            with heartbeats.lane_phase(LanePhase.LOADING):
                assert permitted(harness, heartbeats) == (LanePhase.LOADING, 600)
            assert permitted(harness, heartbeats) == (phase, 600)
            before = heartbeats_of(harness)[1]
            seconds[0] += 300
        assert permitted(harness, heartbeats) == (LanePhase.STEPPING, 30)
        assert heartbeats_of(harness)[1] > before


async def test_ten_times_the_longest_step_is_no_silence(harness: ControllerHarness) -> None:
    """Steps of 2 s change nothing at a timeout of 30 s, steps of 7 s permit 70; shorter ones later change nothing."""
    heartbeats = Heartbeats(harness.participant, LIMITS)
    for duration_s, permitted_s in ((2.0, 30), (7.0, 70), (0.1, 70)):
        heartbeats.lane_step(duration_s)
        assert permitted(harness, heartbeats) == (LanePhase.STEPPING, permitted_s)


async def test_a_new_process_does_not_inherit_the_phase_of_a_crashed_one(harness: ControllerHarness) -> None:
    """The board may have been adopted with it."""
    crashed = Heartbeats(harness.participant, LIMITS)
    crashed.enter_phase(LanePhase.EVALUATING)
    assert permitted(harness, crashed) == (LanePhase.EVALUATING, 600)
    heartbeats = Heartbeats(harness.participant, LIMITS)
    assert permitted(harness, heartbeats) == (LanePhase.STEPPING, 30)


async def test_the_phase_has_a_duration(harness: ControllerHarness, seconds: list[float]) -> None:
    """Stepping is none; a wait for data is one only when it lasts."""
    heartbeats = Heartbeats(harness.participant, LIMITS)
    assert heartbeats.phase() == ("", 0.0)
    with heartbeats.lane_phase(LanePhase.EVALUATING):
        seconds[0] += 0.5
        assert heartbeats.phase() == ("evaluating", 0.5)
    with heartbeats.lane_phase(LanePhase.LOADING):
        seconds[0] += 0.5
        assert heartbeats.phase() == ("", 0.0)
        seconds[0] += 40
        assert heartbeats.phase() == ("loading", 40.5)


# -- the sentinel process ----------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """With a sentinel only where a test starts it: it watches the tests, and acts after a minute at the earliest."""
    monkeypatch.chdir(tmp_path)
    return load_settings(None, ["emergency.sentinel=false", "emergency.heartbeat_timeout_s=60"])


async def test_a_sentinel_watches_while_the_block_runs(board: SignalBoard, settings: Settings) -> None:
    """Its block of the board is claimed; afterwards the process is gone and the block is free."""
    sentinel = SentinelProcess(board, settings)
    async with supervised(sentinel):
        state = board.read("sentinel")
        assert state.record is not None
        assert (state.record.owner_pid, is_alive(sentinel.pid)) == (sentinel.pid, True)
    assert not is_alive(sentinel.pid)
    board.claim("sentinel")


@pytest.mark.parametrize("announcement", ['{"watching": 1}', '{"listening": 1}'])
async def test_a_sentinel_that_watches_another_process_is_refused(
    board: SignalBoard, settings: Settings, announcement: str
) -> None:
    """It must announce the id of this process."""
    command = (sys.executable, "-c", f"print('{announcement}')")
    with pytest.raises(ChildFailedError, match="announced itself with"):
        async with supervised(SentinelProcess(board, settings, command=command)):
            pass


async def test_a_sentinel_refuses_the_board_of_another_run(board: SignalBoard, settings: Settings) -> None:
    """Exit code 3: it cannot watch."""
    board.run_id = "another"
    with pytest.raises(ChildFailedError, match="code 3"):
        async with supervised(SentinelProcess(board, settings)):
            pass


async def test_a_lost_sentinel_is_replaced(board: SignalBoard, settings: Settings) -> None:
    """Its loss is logged and another one watches; the last one stops with the block."""
    sentinel = SentinelProcess(board, settings, retry_s=0.01)
    with capture_logs() as logs:
        async with supervised(sentinel):
            first = sentinel.pid
            os.kill(first, signal.SIGKILL)
            with anyio.fail_after(TIMEOUT_S):
                while (state := board.read("sentinel")).record is None or state.record.owner_pid == first:
                    await anyio.sleep(0.01)
            second = sentinel.pid
            assert state.record.owner_pid == second
    assert [(log["event"], log["detail"]) for log in logs] == [("sentinel_lost", "ended with code -9")]
    assert not is_alive(first)
    assert not is_alive(second)


@pytest.fixture
def stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A board of an earlier boot beside the board."""
    path = tmp_path / "tolaria-run-1"
    SignalBoard.create(path, "run-1").close()
    monkeypatch.setattr(mapping, "boot_id", lambda: bytes(16))
    return path


async def test_stale_boards_are_removed_at_the_start(settings: Settings, stale: Path, board: SignalBoard) -> None:
    """While the heartbeats begin; the run's own board stays."""
    heartbeats = Heartbeats(board.claim("tolaria"), settings.emergency)
    with anyio.fail_after(TIMEOUT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch_process, settings, board, heartbeats)
            while await anyio.Path(stale).exists() or not board.read("tolaria").lane_heartbeat_ns:
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
    assert board.current


# -- stack dumps -------------------------------------------------------------------------------------------------------


def test_stacks_of_a_process_can_be_had_while_it_wants_that() -> None:
    """Again and again; afterwards a request is refused, leaves nothing open, and a late signal does not end it."""
    program = (
        "import os, sys; from tolaria.emergency.supervision import stacks_on_request\n"
        "def main():\n"
        "    before = os.listdir('/proc/self/fd')\n"
        "    for _ in range(2):\n"
        "        with stacks_on_request():\n"
        "            print('begun', flush=True); sys.stdin.readline()\n"
        "    print(before == os.listdir('/proc/self/fd'), flush=True); sys.stdin.readline()\n"
        "main()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for _ in range(2):
            assert child.stdout.readline() == "begun\n"
            for _ in range(2):
                assert summary(stacks_of({0: child.pid})) == "main (<string>:6)"
            child.stdin.write("\n")
            child.stdin.flush()
        assert child.stdout.readline() == "True\n"
        assert "it has just begun" in stacks_of({0: child.pid})[0]
        os.kill(child.pid, STACKS_SIGNAL)
        child.stdin.close()
        assert child.wait(60) == 0


# -- watching the board ------------------------------------------------------------------------------------------------


class WatchedController:
    """A controller on the real clock; each kind of report sets an event."""

    def __init__(self, path: Path) -> None:
        self.board = SignalBoard.create(path, "run-1")
        self.peer_board = SignalBoard.attach(path, "run-1")
        self.failures_left = 0
        self.broadcasts: list[Notice] = []
        self.reported: dict[type[object], anyio.Event] = {}
        self.controller = EmergencyController(
            self.board,
            self.board.claim("tolaria"),
            broadcast=self._broadcast,
            observer=self._observe,
            broadcasts_per_minute=60,
            retry_s=0.05,
        )

    async def until(self, kind: type[object]) -> None:
        with anyio.fail_after(TIMEOUT_S):
            await self.reported.setdefault(kind, anyio.Event()).wait()

    async def until_broadcast(self) -> None:
        with anyio.fail_after(TIMEOUT_S):
            while not self.broadcasts:
                await anyio.sleep(0.005)

    def _broadcast(self, notice: Notice) -> None:
        if self.failures_left:
            self.failures_left -= 1
            raise BroadcastFailedError("down")
        self.broadcasts.append(notice)

    def _observe(self, report: Report) -> None:
        self.reported.setdefault(type(report), anyio.Event()).set()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[WatchedController]:
    """A controller on a new board."""
    watched = WatchedController(tmp_path / "board")
    yield watched
    watched.peer_board.close()
    watched.board.close(unlink=True)


async def test_a_peers_signal_wakes_the_watcher(watched: WatchedController) -> None:
    """Long before its interval ends."""
    kasmina = watched.peer_board.claim("kasmina")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: watch_board(watched.board, watched.controller, interval_s=NEVER_S))
        await anyio.lowlevel.checkpoint()
        kasmina.raise_level(EMERGENCY_LEVEL_HALT, "burning")
        await watched.until(Escalated)
        tasks.cancel_scope.cancel()
    assert watched.controller.state.reason == "burning"


async def test_due_work_is_done_without_a_ring(watched: WatchedController) -> None:
    """A passed deadline is reported and a failed broadcast is retried in time."""
    watched.failures_left = 1
    watched.controller.escalate(EMERGENCY_LEVEL_HALT, "why", "judge")
    began_s = time.monotonic()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: watch_board(watched.board, watched.controller, interval_s=NEVER_S))
        await watched.until(DeadlineMissed)
        await watched.until_broadcast()
        tasks.cancel_scope.cancel()
    assert time.monotonic() - began_s < NEVER_S / 10


async def test_a_lost_board_does_not_end_the_watching(watched: WatchedController) -> None:
    """It is reported, and waiting notices are still broadcast."""
    watched.failures_left = 1
    watched.controller.escalate(EMERGENCY_LEVEL_NOTICE, "why", "judge")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: watch_board(watched.board, watched.controller, interval_s=0.01))
        await anyio.lowlevel.checkpoint()
        watched.board.close()
        await watched.until(BoardUnreadable)
        await watched.until_broadcast()
        tasks.cancel_scope.cancel()
