from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tolaria.emergency.sentinel import Heartbeat, ServiceProcess, SilenceLimits, SilenceMonitor, Stage

TIMEOUT_S = 30.0
LIMITS = SilenceLimits(startup_s=5.0, timeout_s=3.0, grace_s=2.0, drain_s=4.0, look_s_max=1.0)


class Observation:
    """Looks once a second and records the stages entered with the second of each."""

    def __init__(self, startup_s: float = 0.0) -> None:
        self.monitor = SilenceMonitor(replace(LIMITS, startup_s=startup_s))
        self.second = 0
        self.stages: list[tuple[int, Stage]] = []

    def look(self, loop: int, lane: int, elapsed_s: float = 1.0) -> None:
        self.second += 1
        before, self.monitor = self.monitor, self.monitor.look({"loop": loop, "lane": lane}, elapsed_s)
        if self.monitor.stage is not before.stage:
            self.stages.append((self.second, self.monitor.stage))

    def look_at_silence(self, seconds: int) -> None:
        for _ in range(seconds):
            self.look(7, 7)


def test_lasting_silence_leads_to_every_stage() -> None:
    """Alarm at the timeout, SIGTERM after the grace period, SIGKILL after the drain, each once."""
    observation = Observation()
    observation.look_at_silence(30)
    assert observation.stages == [(4, Stage.ALARMED), (6, Stage.TERMINATED), (10, Stage.KILLED)]


@pytest.mark.parametrize("silent", ["loop", "lane"])
def test_one_silent_heartbeat_is_enough(silent: str) -> None:
    """The other heartbeat does not prevent the alarm."""
    observation = Observation()
    for beat in range(1, 6):
        observation.look(7 if silent == "loop" else beat, 7 if silent == "lane" else beat)
    assert observation.monitor.silent == (silent,)
    assert observation.stages[0] == (4, Stage.ALARMED)


@pytest.mark.parametrize("value", [0, 2**63])
def test_the_value_of_a_heartbeat_does_not_matter(value: int) -> None:
    """A heartbeat that never came, or is from the future, is silent when it does not change."""
    observation = Observation()
    for second in range(1, 6):
        observation.look(second, value)
    assert observation.monitor.silent == ("lane",)


def test_a_look_may_permit_another_silence() -> None:
    """The lane's limit is that of its phase at each look, whichever way it changes; the loop's stays."""
    monitor = SilenceMonitor(replace(LIMITS, startup_s=0.0))
    for beat in range(7):
        monitor = monitor.look({"loop": beat, "lane": 7}, 1.0, {"lane": 10.0})
    assert (monitor.stage, monitor.silent) == (Stage.WATCHING, ())
    assert monitor.look({"loop": 8, "lane": 7}, 1.0, {"lane": 7.0}).silent == ("lane",)
    assert monitor.look({"loop": 8, "lane": 7}, 1.0).stage is Stage.ALARMED


def test_a_phase_of_the_lane_permits_no_silence_of_the_loop() -> None:
    """However long the lane may evaluate, the event loop has to beat."""
    monitor = SilenceMonitor(replace(LIMITS, startup_s=0.0))
    for beat in range(5):
        monitor = monitor.look({"loop": 7, "lane": beat}, 1.0, {"lane": 600.0})
    assert monitor.silent == ("loop",)


def test_any_change_is_a_heartbeat() -> None:
    """Values of another clock, also decreasing ones, raise no alarm."""
    observation = Observation()
    for second in range(1, 30):
        observation.look(2**63 - second, second % 2)
    assert observation.stages == []


def test_silence_does_not_count_during_startup() -> None:
    """The timeout begins after the startup allowance."""
    observation = Observation(startup_s=5.0)
    observation.look_at_silence(7)
    assert observation.stages == []
    observation.look_at_silence(2)
    assert observation.stages[0] == (8, Stage.ALARMED)


def test_time_that_was_not_observed_does_not_count() -> None:
    """A sentinel that was stopped for an hour, with the machine, saw no silence."""
    observation = Observation()
    observation.look_at_silence(2)
    observation.look(7, 7, elapsed_s=3600.0)
    assert observation.stages == []
    observation.look(8, 8)
    assert observation.monitor.heartbeats["loop"] == Heartbeat(8, 0.0)


def test_heartbeats_within_the_grace_period_save_the_process() -> None:
    """The process is not ended; the next silence raises the alarm again."""
    observation = Observation()
    observation.look_at_silence(5)
    observation.look(8, 8)
    observation.look_at_silence(6)
    assert [stage for _, stage in observation.stages] == [
        Stage.ALARMED,
        Stage.WATCHING,
        Stage.ALARMED,
        Stage.TERMINATED,
    ]


def test_heartbeats_after_sigterm_do_not_prevent_sigkill() -> None:
    """A process that drains beats on, and is killed if it does not end in time."""
    observation = Observation()
    observation.look_at_silence(6)
    for beat in range(10, 20):
        observation.look(beat, beat)
    assert observation.stages[-1] == (10, Stage.KILLED)
    assert observation.monitor.stage is Stage.KILLED


def test_a_look_does_not_change_the_monitor() -> None:
    """Each look returns a new one."""
    monitor = SilenceMonitor(LIMITS, {"loop": Heartbeat()})
    monitor.look({"loop": 3}, 1.0)
    assert monitor == SilenceMonitor(LIMITS, {"loop": Heartbeat()})


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for a line."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def test_the_end_of_the_process_ends_the_wait(child: subprocess.Popen[bytes]) -> None:
    """Also before its exit code was collected; later signals do nothing."""
    with ServiceProcess(child.pid, while_open=None) as service:
        assert not service.ended_within(0)
        service.send(signal.SIGKILL)
        assert service.ended_within(TIMEOUT_S)
        service.send(signal.SIGTERM)
    assert child.wait() == -signal.SIGKILL


def test_the_end_of_the_input_ends_the_wait(child: subprocess.Popen[bytes]) -> None:
    """Input does not."""
    read, write = os.pipe()
    with ServiceProcess(child.pid, while_open=read) as service:
        os.write(write, b"x")
        assert not service.ended_within(TIMEOUT_S)
        os.close(write)
        assert service.ended_within(TIMEOUT_S)
    os.close(read)


def test_a_missing_process_raises(child: subprocess.Popen[bytes]) -> None:
    """A sentinel without a process to watch must not start."""
    child.kill()
    child.wait()
    with pytest.raises(ProcessLookupError):
        ServiceProcess(child.pid, while_open=None)
