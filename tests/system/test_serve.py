"""The real service as a process: start, RPCs, scrape, drain, and starts that fail."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.enums_pb2 import CIRCUIT_STATE_OPEN
from support.processes import Serve, is_alive, serve, stub_of, wait_for_steps

LONG = ["training.epochs=100000"]
BUF = Path(sys.executable).with_name("buf")


def get(service: Serve, path: str) -> tuple[int, str]:
    """Returns status code and body of a page on the metrics port."""
    try:
        with urllib.request.urlopen(f"http://{service.addresses()[1]}{path}", timeout=180) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_service_trains_answers_scrapes_and_drains(tmp_path: Path) -> None:
    """RPCs respond during training, a pause holds it, metrics can be scraped, and SIGTERM ends it with exit code 0.

    A stream that is open when SIGTERM comes gets the last status and ends; it does not delay the shutdown.
    """
    with serve(*LONG, cwd=tmp_path, reference_peers=True) as service, stub_of(service) as stub:
        status = wait_for_steps(stub, 50)
        assert status.state == admin.RUN_STATE_RUNNING
        paused = stub.PauseTraining(admin.PauseTrainingRequest(request_id="p", reason="look"), timeout=180)
        first = stub.GetStatus(admin.GetStatusRequest())
        for number in range(3):  # a lane that was not held would make steps between these
            request = admin.CreateCheckpointRequest(request_id=f"c{number}", reason="look")
            assert stub.CreateCheckpoint(request, timeout=180).global_step == paused.global_step
        second = stub.GetStatus(admin.GetStatusRequest())
        assert first.state == second.state == admin.RUN_STATE_PAUSED
        assert first.global_step == second.global_step == paused.global_step
        assert second.state_reason == "look"
        stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="r", reason="fine"), timeout=180)
        wait_for_steps(stub, paused.global_step)
        code, text = get(service, "/metrics")
        assert code == 200
        assert "tolaria_training_step " in text
        assert 'tolaria_build_info{device="cpu"' in text
        assert get(service, "/readyz")[0] == get(service, "/livez")[0] == 200
        with grpc.insecure_channel(service.addresses()[0]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)  # its methods are missing from its type stubs
            for part in ("", "tolaria.training", "tolaria.tamiyo", "tolaria.kasmina"):
                assert health.Check(health_pb2.HealthCheckRequest(service=part)).status == 1, part
        children = service.children()
        assert len(children) == 4  # the lane, both peers and the sentinel
        stream = stub.WatchStatus(admin.WatchStatusRequest(), timeout=180)
        next(stream)
        started = time.monotonic()
        service.terminate()
        states = [answer.status.state for answer in stream]
        assert service.wait() == 0
        assert time.monotonic() - started < 10
        assert not any(is_alive(pid) for pid in children)
    assert states[-1] == admin.RUN_STATE_FINISHED
    assert service.events()[-1]["event"] == "stopped"


def test_a_finished_run_stays_readable(tmp_path: Path) -> None:
    """Without exit_when_done the service keeps serving status, metrics and readiness."""
    with serve("training.epochs=1", cwd=tmp_path) as service, stub_of(service) as stub:
        deadline = time.monotonic() + 180
        while stub.GetStatus(admin.GetStatusRequest()).state != admin.RUN_STATE_FINISHED:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert get(service, "/readyz")[0] == 200
        service.terminate()
        assert service.wait() == 0


def test_the_code_of_a_job_runs_as_in_a_plain_process(tmp_path: Path) -> None:
    """It may run an event loop, and the garbage collector is on, which leaves out only what was imported before."""
    with serve("training.job=support.jobs:raises_what_it_finds", cwd=tmp_path) as service:
        assert service.wait() == 2
    assert "collects: True, leaves most out: True" in service.lines[-1]


@pytest.mark.slow
def test_a_job_that_fails_during_training_fails_the_run(tmp_path: Path) -> None:
    """The state is FAILED, the service is not ready and exits with code 1; the traceback is in the log."""
    with serve("training.job=support.jobs:LateCrashJob", cwd=tmp_path) as service, stub_of(service) as stub:
        deadline = time.monotonic() + 180
        while stub.GetStatus(admin.GetStatusRequest()).state != admin.RUN_STATE_FAILED:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        code, text = get(service, "/readyz")
        assert code == 503
        assert "the disk with the labels is gone" in text
        service.terminate()
        assert service.wait() == 1
    assert any(e["event"] == "training_failed" and e["exception"] for e in service.events())


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("training.job=nope", 2, "training.job 'nope' is not registered"),
        pytest.param(
            *("training.job=support.jobs:VectorLossJob", 2, "must be a scalar, got shape (8, 1)"),
            marks=pytest.mark.slow,
        ),
        ("training.epocs=3", 2, "training.epocs: unknown field"),
        ("tamiyo.target=nowhere", 2, "'nowhere' is not host:port"),
        pytest.param("training.device=cuda:63", 2, "training.device", marks=pytest.mark.slow),
    ],
)
def test_an_invalid_start_prints_one_clear_message(override: str, code: int, words: str, tmp_path: Path) -> None:
    """A mistake of the user exits with code 2 and a message, without traceback; no training begins."""
    with serve(override, cwd=tmp_path) as service:
        assert service.wait() == code
    said = "\n".join(service.lines)
    assert words in said
    assert "Traceback" not in said
    assert '"run_state"' not in said
    assert '"lane_stuck"' not in said
    assert words in "\n".join(service.lines[-2:])


BROKEN_JOB = "training.job=support.jobs:raising_factory"


@pytest.mark.parametrize("setting", ["server.listen", "metrics.listen"])
def test_a_port_in_use_is_reported_before_the_job_is_built(setting: str, tmp_path: Path) -> None:
    """In one line with the setting, the address and the process that has it, and exit code 2; nothing is left."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        other = "metrics.listen" if setting == "server.listen" else "server.listen"
        with serve(f"{setting}={address}", f"{other}=127.0.0.1:0", BROKEN_JOB, cwd=tmp_path, ports=False) as service:
            assert service.wait() == 2
    (line,) = service.lines
    assert line.startswith(f"tolaria: {setting}: ")
    assert line.endswith(f"cannot listen on {address}: Address already in use (process {os.getpid()})")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not BUF.exists(), reason="buf, an independent gRPC client, is not installed")
def test_an_independent_client_works_by_reflection(tmp_path: Path) -> None:
    """`buf curl` has no stubs: it queries reflection, then calls GetStatus and PauseTraining."""
    with serve(*LONG, cwd=tmp_path) as service:
        address = service.addresses()[0]

        def curl(method: str, data: str) -> subprocess.CompletedProcess[str]:
            url = f"http://{address}/leyline.v1.TolariaAdminService/{method}"
            command = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", data, url]
            return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)

        assert json.loads(curl("GetStatus", "{}").stdout)["job"] == "digits"
        paused = curl("PauseTraining", '{"requestId": "1", "reason": "by buf"}')
        assert json.loads(paused.stdout)["state"] == "RUN_STATE_PAUSED"
        refused = curl("PauseTraining", '{"requestId": "2"}')
        assert refused.returncode != 0
        assert "reason: must not be empty" in refused.stderr


@pytest.mark.parametrize("peer", ["tamiyo", pytest.param("kasmina", marks=pytest.mark.slow)])
def test_a_dead_peer_does_not_stop_training(peer: str, tmp_path: Path) -> None:
    """With nothing listening at the target, training continues at full speed, and the breaker opens."""
    arguments = [f"{peer}.target=127.0.0.1:1", "training.epochs=100000"]
    with serve(*arguments, cwd=tmp_path) as service, stub_of(service) as stub:
        deadline = time.monotonic() + 180
        while stub.GetStatus(admin.GetStatusRequest()).breakers[peer] != CIRCUIT_STATE_OPEN:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        status = wait_for_steps(stub, stub.GetStatus(admin.GetStatusRequest()).global_step)
        assert status.state == admin.RUN_STATE_RUNNING
        service.terminate()
        assert service.wait() == 0
