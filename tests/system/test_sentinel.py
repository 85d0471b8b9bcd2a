from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT
from support.processes import is_alive
from support.waiting import wait_for
from tolaria.signals import SignalBoard

HERE = Path(__file__).parent
WAIT_S = 180.0
TIMEOUT_S, PHASE_TIMEOUT_S = 1.0, 3.0  # the stand-in's


class StandIn:
    """A running stand-in, its sentinel, and a view of their board."""

    def __init__(self, folder: Path, silence: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, HERE / "sentinel_service.py", folder, silence],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self.sentinel_pid = int(self.process.stdout.readline())
        self.board = SignalBoard.attach(folder / "board", "run-1")

    def fall_silent(self) -> None:
        """Stops the heartbeats, as chosen at the start."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def logged(self) -> list[str]:
        """Returns the events that its sentinel logged to standard error, once both have ended."""
        _, errors = self.process.communicate(timeout=WAIT_S)
        return [json.loads(line)["event"] for line in errors.splitlines() if line.startswith(b'{"event"')]


@contextmanager
def stand_in(folder: Path, silence: str) -> Iterator[StandIn]:
    """A stand-in that is killed after the block."""
    service = StandIn(folder, silence)
    try:
        yield service
    finally:
        service.process.kill()
        service.process.communicate()
        wait_for(lambda: not is_alive(service.sentinel_pid), WAIT_S)
        service.board.close()


def test_sentinel_acts_while_the_gil_is_held(tmp_path: Path, reader: Path) -> None:
    """A C program sees HALT within the timeout; stacks are dumped; SIGTERM has no effect, and SIGKILL ends it."""
    with stand_in(tmp_path, "gil") as service:
        waiting = [str(reader), str(tmp_path / "board"), "wait", "4", str(int(WAIT_S * 1000))]
        with subprocess.Popen(waiting, stdout=subprocess.PIPE) as waiter:
            service.fall_silent()
            assert waiter.wait(WAIT_S) == 0
        beat_ns = service.board.read("tolaria").heartbeat_ns
        signal_seen = service.board.effective()
        assert signal_seen is not None
        assert (signal_seen.origin, signal_seen.level) == ("sentinel", EMERGENCY_LEVEL_HALT)
        assert "event loop" in signal_seen.reason
        assert "lane" in signal_seen.reason
        assert TIMEOUT_S * 0.8 < (signal_seen.raised_ns - beat_ns) / 1e9 < TIMEOUT_S * 10
        assert service.process.wait(WAIT_S) == -signal.SIGKILL
        wait_for(lambda: not is_alive(service.sentinel_pid))
        stacks = (tmp_path / "stacks.txt").read_text()
        assert stacks.index("no heartbeat of the event loop") < stacks.index("in hold_the_gil")
        assert service.logged() == [
            "sentinel_raised_halt",
            "sentinel_took_stacks",
            "sentinel_ends_service",
            "sentinel_ends_service",
        ]


def test_sentinel_detects_a_hanging_lane_beside_a_healthy_event_loop(tmp_path: Path) -> None:
    """A missing heartbeat of the lane alone raises HALT, and SIGTERM is enough to end the service."""
    with stand_in(tmp_path, "lane") as service:
        service.fall_silent()
        wait_for(lambda: service.board.effective() is not None)
        signal_seen = service.board.effective()
        assert signal_seen is not None
        assert "the lane" in signal_seen.reason
        assert "event loop" not in signal_seen.reason
        assert service.process.wait(WAIT_S) == 77
        wait_for(lambda: not is_alive(service.sentinel_pid))


def test_a_silent_service_whose_threads_run_survives_that_its_stacks_are_looked_at(tmp_path: Path) -> None:
    """It is ended by SIGTERM, in order: a look without the GIL would read stacks while they change."""
    with stand_in(tmp_path, "busy") as service:
        service.fall_silent()
        assert service.process.wait(WAIT_S) == 77
        stacks = (tmp_path / "stacks.txt").read_text()
        assert "in changes_its_stack" in stacks or "in new" in stacks  # the deepest hundred calls are shown


def test_a_disk_that_hangs_does_not_keep_a_silent_service(tmp_path: Path) -> None:
    """It is ended all the same; where it was is on standard error."""
    os.mkfifo(tmp_path / "stacks.txt")  # nobody reads it: opening it blocks
    with stand_in(tmp_path, "lane") as service:
        service.fall_silent()
        assert service.process.wait(WAIT_S) == 77
        assert "sentinel_took_stacks" in service.logged()


def test_sentinel_permits_a_phase_its_own_silence(tmp_path: Path) -> None:
    """A lane that hangs in an evaluation is silent after the longer limit, and the reason names what it was doing."""
    with stand_in(tmp_path, "evaluate") as service:
        service.fall_silent()
        wait_for(lambda: service.board.effective() is not None)
        signal_seen = service.board.effective()
        assert signal_seen is not None
        assert signal_seen.reason.endswith("while evaluating")
        silent_s = (signal_seen.raised_ns - service.board.read("tolaria").lane_heartbeat_ns) / 1e9
        assert PHASE_TIMEOUT_S * 0.9 < silent_s < PHASE_TIMEOUT_S * 10


def test_sentinel_ignores_an_idle_lane(tmp_path: Path) -> None:
    """No signal is raised for more than twice the timeout, measured by the sentinel's heartbeat."""
    with stand_in(tmp_path, "rest") as service:
        service.fall_silent()
        until_ns = service.board.read("sentinel").heartbeat_ns + int(2.5e9 * TIMEOUT_S)
        wait_for(lambda: service.board.read("sentinel").heartbeat_ns > until_ns)
        assert service.board.effective() is None
        assert service.process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_sentinel_ends_with_its_service(tmp_path: Path, number: signal.Signals) -> None:
    """The sentinel exits whether the service was killed or terminated."""
    with stand_in(tmp_path, "rest") as service:
        assert is_alive(service.sentinel_pid)
        service.process.send_signal(number)
        service.process.wait(WAIT_S)
        wait_for(lambda: not is_alive(service.sentinel_pid))
        assert service.logged() == []


def test_sentinel_needs_neither_torch_nor_grpc() -> None:
    """The module loads neither, nor asyncio, so that none of them can block it."""
    program = (
        "import sys, tolaria.emergency.sentinel; "
        "sys.exit(bool({'torch', 'grpc', 'prometheus_client', 'asyncio'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
