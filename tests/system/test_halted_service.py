"""A halted service with an unread log, and the way back to training after a restart; phases of a slow job."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import termios
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

import grpc
import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from leyline.v1.enums_pb2 import (
    EMERGENCY_LEVEL_HALT,
    EMERGENCY_LEVEL_UNSPECIFIED,
    HEALTH_STATUS_CRITICAL,
    HEALTH_STATUS_HEALTHY,
    HEALTH_STATUS_UNHEALTHY,
)
from support.processes import Serve, python_path, serve
from support.waiting import wait_for
from tolaria.checkpoint.directory import JOURNAL
from tolaria.journal.reader import read_journal
from tolaria.journal.rows import EmergencyRow
from tolaria.signals import SignalBoard

PIPE_BYTES, LINE_BYTES = 4096, 1000
DEADLINE_S = 20.0  # far more than the 0.1 s of HALT: machines are busy
LONG = ["training.epochs=1000000", "training.job=support.user_jobs:Line"]


class Operator:
    """Calls the service as `tolaria` does."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub: Any = TolariaAdminServiceStub(channel)
        self._requests = 0

    def status(self) -> admin.GetStatusResponse:
        """Returns the status."""
        answer: admin.GetStatusResponse = self._stub.GetStatus(admin.GetStatusRequest(), timeout=180)
        return answer

    def incidents(self) -> list[str]:
        """Returns the reasons of the incidents, newest first."""
        return [incident.reason for incident in self._stub.ListIncidents(admin.ListIncidentsRequest()).incidents]

    def raise_halt(self, reason: str) -> None:
        """Raises HALT."""
        self._stub.RaiseEmergency(
            admin.RaiseEmergencyRequest(request_id=reason, reason=reason, level=EMERGENCY_LEVEL_HALT), timeout=180
        )

    def clear(self) -> admin.ClearEmergencyResponse:
        """Clears the emergency."""
        answer: admin.ClearEmergencyResponse = self._stub.ClearEmergency(
            admin.ClearEmergencyRequest(request_id="clear", reason="no smoke"), timeout=180
        )
        return answer

    def resume(self, request_id: str) -> None:
        """Resumes the run."""
        self._stub.ResumeTraining(admin.ResumeTrainingRequest(request_id=request_id, reason="on"), timeout=180)


def fetch(address: str, path: str) -> str:
    """Returns the body of a response, also of a failed probe."""
    try:
        with urllib.request.urlopen(f"http://{address}/{path}", timeout=180) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        return error.read().decode()


class UnreadService:
    """A service whose log is read until it serves, and never again: standard error is a full pipe from then on."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self._read, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        chosen = ["server.listen=127.0.0.1:0", "metrics.listen=127.0.0.1:0", "logging.format=json", *overrides]
        settings = [part for override in chosen for part in ("--set", override)]
        environment = os.environ | {"PYTHONPATH": python_path()}
        command = [sys.executable, "-m", "tolaria", "serve", *settings]
        self.process = subprocess.Popen(command, stderr=write, cwd=folder, env=environment)
        os.close(write)
        log = b""
        while not (serving := re.search(rb'^.*"serving".*$', log, re.MULTILINE)) or not log.endswith(b"\n"):
            chunk = os.read(self._read, PIPE_BYTES)
            assert chunk, log
            log += chunk
        self.serving: dict[str, str] = json.loads(serving[0])

    @property
    def unread_bytes(self) -> int:
        """Bytes in the pipe."""
        return int.from_bytes(fcntl.ioctl(self._read, termios.FIONREAD, bytes(4)), sys.byteorder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(20)
        os.close(self._read)


@pytest.mark.timeout(900)  # it starts two services
@pytest.mark.skipif(sys.platform != "linux", reason="the size of a pipe can be set on Linux only")
def test_nothing_that_blocks_the_log_hides_a_halt(tmp_path: Path) -> None:
    """It is on the board, in the journal, in the metrics and in the incidents within its deadline, and after kill -9.

    The next process is halted and says how to go on; clearing alone does not train, a resume before it is refused.
    """
    board = tmp_path / "board"
    with (
        UnreadService(tmp_path, *LONG, f"signals.path={board}") as service,
        grpc.insecure_channel(service.serving["grpc"]) as channel,
    ):
        operator = Operator(channel)
        wait_for(lambda: service.unread_bytes > PIPE_BYTES - LINE_BYTES)
        raised_s = time.monotonic()
        operator.raise_halt("smoke")
        with SignalBoard.attach(board) as attached:
            signal = attached.effective()
        wait_for(lambda: operator.incidents()[:1] == ["smoke"], DEADLINE_S)
        assert "\ntolaria_emergency_halt 1.0\n" in fetch(service.serving["metrics"], "metrics")
        assert time.monotonic() - raised_s < DEADLINE_S
        assert signal is not None
        assert (signal.level, signal.reason) == (EMERGENCY_LEVEL_HALT, "smoke")
        halted = operator.status()
        assert (halted.state, halted.health.status) == (admin.RUN_STATE_HALTED, HEALTH_STATUS_CRITICAL)
        assert "smoke" in halted.health.summary
    rows = read_journal(tmp_path / "state" / JOURNAL, EmergencyRow)
    assert ("smoke", "halt", None) in [(row.reason, row.level, row.cleared_at_ns) for row in rows]
    with (
        serve(*LONG, f"signals.path={board}", cwd=tmp_path) as restarted,
        grpc.insecure_channel(restarted.addresses()[0]) as channel,
    ):
        go_on_after_a_restart(restarted, Operator(channel))


def go_on_after_a_restart(service: Serve, operator: Operator) -> None:
    """Does what the status says."""
    wait_for(lambda: operator.status().state == admin.RUN_STATE_HALTED)
    halted = operator.status()
    assert (halted.emergency_level, halted.health.status) == (EMERGENCY_LEVEL_HALT, HEALTH_STATUS_CRITICAL)
    assert "clear the emergency (tolaria emergency clear), then resume (tolaria resume)" in halted.health.summary
    with pytest.raises(grpc.RpcError, match="clear it first"):
        operator.resume("too early")
    assert operator.clear().state == admin.RUN_STATE_HALTED
    cleared = operator.status()
    assert (cleared.emergency_level, cleared.health.status) == (EMERGENCY_LEVEL_UNSPECIFIED, HEALTH_STATUS_UNHEALTHY)
    assert "resume it" in cleared.state_reason
    assert json.loads(fetch(service.addresses()[1], "readyz"))["ready"] is False
    operator.resume("now")
    wait_for(lambda: operator.status().global_step > halted.global_step)
    assert operator.status().health.status == HEALTH_STATUS_HEALTHY
    service.terminate()
    assert service.wait() == 0


@pytest.mark.slow
def test_a_slow_evaluation_is_no_silence(tmp_path: Path) -> None:
    """An evaluation of three heartbeat timeouts is shown as what it is, and training goes on."""
    job = ["training.job=support.user_jobs:SlowEvaluation", "training.options.eval_s=4", "training.epochs=1000"]
    limits = ["emergency.heartbeat_timeout_s=1.3", "emergency.startup_allowance_s=0.1", "emergency.grace_s=60"]
    with (
        serve(*job, *limits, "training.options.samples=176", cwd=tmp_path) as service,
        grpc.insecure_channel(service.addresses()[0]) as channel,
    ):
        operator = Operator(channel)
        wait_for(lambda: operator.status().phase == "evaluating")
        wait_for(lambda: operator.status().epoch == 2)
        assert operator.status().state == admin.RUN_STATE_RUNNING
        service.process.kill()
    assert [event for event in service.events() if event["event"].startswith("sentinel_raised")] == []
