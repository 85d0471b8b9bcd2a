"""Emergencies in the real service, with both reference peers."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT, EMERGENCY_LEVEL_UNSPECIFIED
from support.boards import acknowledgements
from support.processes import Serve, serve
from support.waiting import wait_for
from tolaria.config import EmergencySettings
from tolaria.signals import SignalBoard

LONG = ["training.epochs=100000"]
PATIENCE_S = 180.0


def tolaria(service: Serve, *arguments: str) -> str:
    """Returns the output of the command."""
    command = [sys.executable, "-m", "tolaria", *arguments, "--timeout", "30", "--address", service.addresses()[0]]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout


def ready(service: Serve) -> bool:
    """Whether /readyz reports that the service is ready."""
    try:
        with urllib.request.urlopen(f"http://{service.addresses()[1]}/readyz", timeout=180) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return False


@dataclass(frozen=True)
class Hold:
    """How long the GIL is held, the heartbeat timeout, and the interval at which the sentinel checks."""

    seconds: int
    timeout_s: float
    look_s: float


@pytest.fixture
def hold(request: pytest.FixtureRequest) -> Hold:
    """With `--long` more than a minute and the default timeout; otherwise the same within seconds."""
    if request.config.getoption("--long"):
        return Hold(70, EmergencySettings().heartbeat_timeout_s, look_s=0.5)
    return Hold(8, 2.0, look_s=0.1)


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """The path of the service's board."""
    return tmp_path / "board"


def test_a_halt_is_acknowledged_by_all_participants_and_can_be_cleared(tmp_path: Path, board: Path) -> None:
    """Both peers and the lane acknowledge; no step is made while halted; training continues from the same step."""
    with (
        serve(*LONG, f"signals.path={board}", cwd=tmp_path, reference_peers=True) as service,
        grpc.insecure_channel(service.addresses()[0]) as channel,
    ):
        stub = TolariaAdminServiceStub(channel)

        def status() -> admin.GetStatusResponse:
            answer: admin.GetStatusResponse = stub.GetStatus(admin.GetStatusRequest(), timeout=180)
            return answer

        wait_for(lambda: status().global_step > 20)
        request = admin.RaiseEmergencyRequest(request_id="1", reason="smoke", level=EMERGENCY_LEVEL_HALT)
        raised = stub.RaiseEmergency(request, timeout=180)
        assert raised.state == admin.RUN_STATE_HALTED
        participants = {"tolaria", "kasmina", "tamiyo"}
        assert participants.issuperset(given.participant for given in raised.acknowledgements)  # those that were quick
        wait_for(lambda: participants.issubset(attached_acknowledgements(board, effective_id(board))))
        halted = status()
        for number in range(3):  # a lane that was not held would make steps between these
            created = stub.CreateCheckpoint(
                admin.CreateCheckpointRequest(request_id=f"c{number}", reason="look"), timeout=180
            )
            assert created.global_step == halted.global_step
        assert status().global_step == halted.global_step
        assert not ready(service)
        assert "emergency: halt\n" in tolaria(service, "emergency", "show")
        with pytest.raises(grpc.RpcError, match="clear it first"):
            stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="2", reason="x"), timeout=180)
        tolaria(service, "emergency", "clear", "--reason", "no smoke")
        assert status().emergency_level == EMERGENCY_LEVEL_UNSPECIFIED
        assert status().global_step == halted.global_step
        tolaria(service, "resume", "--reason", "on")
        wait_for(lambda: status().global_step > halted.global_step)
        wait_for(lambda: ready(service))
        service.terminate()
        assert service.wait() == 0
    assert not board.exists()
    (halt,) = [event for event in service.events() if event["event"] == "tolaria.emergency.halt"]
    assert halt["reason"] == "smoke"


def test_an_operator_can_halt_training_through_the_board(tmp_path: Path, board: Path) -> None:
    """`tolaria signals raise` makes no RPC, and training halts all the same."""
    with serve(*LONG, f"signals.path={board}", cwd=tmp_path) as service:
        service.addresses()
        command = [sys.executable, "-m", "tolaria", "signals", "raise", "halt", "--reason", "by hand"]
        subprocess.run([*command, "--board", str(board)], check=True, timeout=180)
        wait_for(lambda: json.loads(tolaria(service, "status", "--json"))["state"] == "RUN_STATE_HALTED")


@pytest.mark.timeout(900)
def test_a_lane_that_holds_the_gil_is_detected_by_the_sentinel(
    tmp_path: Path, board: Path, reader: Path, hold: Hold
) -> None:
    """A C program sees HALT while the process is blocked; stacks are dumped; the run is halted once it responds.

    This is what protects a service whose lane is one of its threads; a lane in a child process is killed instead.
    """
    job = ["lane.mode=thread", "training.job=support.jobs:GilJob", f"training.options.seconds={hold.seconds}", *LONG]
    patience = [f"emergency.heartbeat_timeout_s={hold.timeout_s}", "emergency.startup_allowance_s=0.1"]
    with serve(*job, *patience, "emergency.grace_s=60", f"signals.path={board}", cwd=tmp_path) as service:
        wait_for(board.exists)
        waiting = [str(reader), str(board), "wait", "4", str(int((PATIENCE_S + hold.timeout_s) * 1000))]
        assert subprocess.run(waiting, check=False, stdout=subprocess.DEVNULL).returncode == 0
        with SignalBoard.attach(board) as attached:
            raised = attached.effective()
            assert raised is not None
            assert raised.origin == "sentinel"
            silent_s = (raised.raised_ns - attached.read("tolaria").heartbeat_ns) / 1e9
            assert 0.75 * hold.timeout_s < silent_s < hold.timeout_s + 20 * hold.look_s < hold.seconds
            assert "tolaria" not in acknowledgements(attached, raised.signal_id)
            wait_for(lambda: attached.read("tolaria").heartbeat_ns > raised.raised_ns, PATIENCE_S + hold.seconds)
        wait_for(lambda: json.loads(tolaria(service, "status", "--json"))["state"] == "RUN_STATE_HALTED")
        wait_for(lambda: "tolaria" in attached_acknowledgements(board, raised.signal_id))
        stacks = (tmp_path / "state" / "stacks.txt").read_text()
        assert stacks.index("no heartbeat of the event loop") < stacks.index("in losses")
        service.terminate()
        service.wait()
    assert "tolaria.heartbeat_lost" in [event["event"] for event in service.events()]


def effective_id(board: Path) -> int:
    """Returns the id of the signal that is in force, read from a newly attached board."""
    with SignalBoard.attach(board) as attached:
        signal = attached.effective()
        assert signal is not None
        return signal.signal_id


def attached_acknowledgements(board: Path, signal_id: int) -> dict[str, int]:
    """Returns the acknowledgements of a signal, read from a newly attached board."""
    with SignalBoard.attach(board) as attached:
        return acknowledgements(attached, signal_id)
