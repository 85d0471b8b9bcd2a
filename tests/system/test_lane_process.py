"""A real service whose lane, in a process of its own, dies in every way that user code and machines offer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from support.mortal_lanes import ENDLESS, JOB, lane_of, losses, recoveries, stop_for_good
from support.peers import FakeKasmina, served_without_change
from support.processes import is_alive, serve, status, stub_of
from support.runs_on_disk import last_checkpoint
from support.waiting import wait_for

RUNNING, PAUSED, RECOVERING = admin.RUN_STATE_RUNNING, admin.RUN_STATE_PAUSED, admin.RUN_STATE_RECOVERING


@pytest.fixture
def peers() -> Iterator[list[str]]:
    """Runs a Tamiyo that changes nothing, so that runs differ in nothing but deaths; yields the settings."""
    with served_without_change(FakeKasmina) as settings:
        yield settings


def test_a_job_that_ends_the_process_while_it_is_built_is_refused(tmp_path: Path) -> None:
    """The service ends with an error that says so, instead of trying for an hour."""
    with serve("training.job=support.mortal_jobs:exiting_factory", cwd=tmp_path) as service:
        assert service.wait() != 0
    assert "ended with code 5" in service.lines[-1]


@pytest.mark.slow
def test_a_paused_run_is_paused_after_a_death(tmp_path: Path) -> None:
    """Meanwhile status says so, and requests that need the lane are refused with a reason; resuming goes on."""
    with serve(*ENDLESS, cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 200)
        stub.PauseTraining(admin.PauseTrainingRequest(request_id="p", reason="look"), timeout=180)
        before = lane_of(service)
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: losses(service) != [])
        with pytest.raises(grpc.RpcError) as refused:
            stub.CreateCheckpoint(admin.CreateCheckpointRequest(request_id="c", reason="now"), timeout=180)
        assert refused.value.code() is grpc.StatusCode.ABORTED
        wait_for(lambda: recoveries(service) == 1)
        step = status(stub).global_step
        time.sleep(0.5)
        assert (status(stub).state, status(stub).global_step) == (PAUSED, step)
        stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="r", reason="go on"), timeout=180)
        wait_for(lambda: status(stub).global_step > step + 100)
        assert lane_of(service) not in {0, before}


@pytest.mark.slow
def test_a_lane_that_is_stopped_while_it_rests_is_noticed(peers: list[str], tmp_path: Path) -> None:
    """No heartbeat of its steps is due then, but one of its process."""
    limits = ["emergency.heartbeat_timeout_s=4", "emergency.phase_timeout_s=5"]
    with serve(*ENDLESS, *peers, *limits, cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 50)
        stub.PauseTraining(admin.PauseTrainingRequest(request_id="p", reason="look"), timeout=180)
        time.sleep(7)  # a rest is no silence
        assert losses(service) == []
        stop_for_good(lane_of(service))
        wait_for(lambda: recoveries(service) == 1)
        assert status(stub).state == PAUSED
    assert [line["cause"] for line in losses(service)] == ["silent"]


@pytest.mark.slow
def test_a_container_that_is_frozen_for_a_while_loses_nothing(peers: list[str], tmp_path: Path) -> None:
    """As by `docker pause`: the service may run first afterwards, and the lane has given no heartbeat meanwhile."""
    limits = ["emergency.heartbeat_timeout_s=4", "emergency.sentinel=false"]
    with serve(*ENDLESS, *peers, *limits, cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 50)
        both = service.process.pid, lane_of(service)
        for pid in both:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(6)
        for pid in both:
            os.kill(pid, signal.SIGCONT)
            time.sleep(1.5)
        step = status(stub).global_step
        wait_for(lambda: status(stub).global_step > step + 50)
    assert losses(service) == []


def test_what_operators_do_works_before_and_after_a_death(tmp_path: Path) -> None:
    """Rollbacks of both tiers, learning rates, checkpoints and profiles; an adjusted rate outlives the death."""
    with serve(*ENDLESS, "rollback.fast_budget_s=20", cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 200)
        stub.AdjustLearningRate(
            admin.AdjustLearningRateRequest(request_id="lr", reason="calm", factor=0.5), timeout=180
        )
        operate(stub, "before")
        os.kill(lane_of(service), signal.SIGSEGV)
        wait_for(lambda: recoveries(service) == 1)
        assert status(stub).learning_rates["host"] == pytest.approx(0.0005)
        operate(stub, "after")
        assert status(stub).state == RUNNING


def operate(stub: TolariaAdminServiceStub, name: str) -> None:
    """Has a checkpoint and a profile made, and rolls back by both tiers."""
    stub.CreateCheckpoint(admin.CreateCheckpointRequest(request_id=f"c{name}", reason="now"), timeout=180)
    profile = stub.CaptureProfile(
        admin.CaptureProfileRequest(request_id=f"f{name}", reason="look", active_steps=3), timeout=180
    )
    assert Path(profile.path).stat().st_size > 0
    for tier in (1, 2):
        request = admin.TriggerRollbackRequest(request_id=f"{name}{tier}", tier=tier, reason="odd")  # type: ignore[arg-type]
        back = stub.TriggerRollback(request, timeout=180)
        assert (back.tier, back.state_digest) == (tier, back.expected_digest)


def test_a_killed_service_leaves_no_process(tmp_path: Path) -> None:
    """Neither the lane nor the workers of its loader outlive it, even while the lane holds the GIL."""
    arguments = ["training.job=support.user_jobs:Loader", "training.options.workers=2", "training.device=cpu"]
    with serve(*arguments, "training.epochs=1000000", cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 5)
        lane = lane_of(service)
        wait_for(lambda: len(workers_of(lane)) == 2)
        workers = workers_of(lane)
        service.process.kill()
        service.wait()
        wait_for(lambda: not any(map(is_alive, [lane, *workers])))


def workers_of(lane: int) -> list[int]:
    """Returns the processes that the lane has started."""
    children = Path(f"/proc/{lane}/task/{lane}/children").read_text().split()
    return [pid for pid in map(int, children) if is_alive(pid)]


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param("stop", marks=pytest.mark.long), "drain"])
def test_a_run_can_be_ended_while_its_lane_is_being_started_again(how: str, tmp_path: Path) -> None:
    """It is stopped, or drained, and not failed, after a last checkpoint of the state that is restored."""
    with serve(*ENDLESS, "service.exit_when_done=true", cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 100)
        os.kill(lane_of(service), signal.SIGKILL)
        wait_for(lambda: status(stub).state == RECOVERING)
        if how == "stop":
            stub.StopTraining(admin.StopTrainingRequest(request_id="s", reason="enough"), timeout=180)
        else:
            service.terminate()
        assert service.wait() == 0
    assert service.events()[-1]["outcome"] == ("stopped" if how == "stop" else "drained")
    assert last_checkpoint(tmp_path)[0] > 0


def test_the_first_rpc_is_answered_before_torch_is_imported(peers: list[str], tmp_path: Path) -> None:
    """The service starts without it, and does not wait for the process that imports it."""
    with serve(*ENDLESS, *peers, cwd=tmp_path) as service, grpc.insecure_channel(service.addresses()[0]) as channel:
        answer = status(TolariaAdminServiceStub(channel))
        loaded = [pid for pid in (service.process.pid, lane_of(service)) if pid and "libtorch_cpu" in maps_of(pid)]
        assert (answer.state, loaded) == (admin.RUN_STATE_STARTING, [])
        wait_for(lambda: status(TolariaAdminServiceStub(channel)).state == RUNNING)
        assert "libtorch_cpu" in maps_of(lane_of(service))
        assert "libtorch_cpu" not in maps_of(service.process.pid)


def maps_of(pid: int) -> str:
    """Returns what a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text()


def test_a_lane_prints_what_its_job_prints_and_gets_no_secret(tmp_path: Path) -> None:
    """Standard output is that of the service; the secret, for commands of the controller, does not stop the lane."""
    arguments = [*JOB, "training.epochs=2", "training.options.says=hello", "service.exit_when_done=true"]
    with serve(*arguments, "leyline.secret=0123456789abcdef0123456789abcdef", cwd=tmp_path) as service:
        assert service.wait() == 0
        assert service.process.stdout is not None
        assert service.process.stdout.read().strip() == "hello"
    assert losses(service) == []
