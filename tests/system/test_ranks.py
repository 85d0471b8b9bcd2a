"""A real service whose lane is a group of two ranks on the CPU; what operators do with it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from support.groups import GROUP, JOB, LIMITS, agent_of, named
from support.peers import FakeKasmina, served_without_change
from support.processes import serve, status, stub_of
from support.runs_on_disk import last_checkpoint
from support.waiting import wait_for
from tolaria.ranks.local_ranks import ranks_of

ENDLESS: Final = ["training.epochs=100000000", "training.options.step_s=0.001", "training.options.lr=0.001"]


@pytest.fixture(scope="module")
def peers() -> Iterator[list[str]]:
    """Runs a Tamiyo that changes nothing, so that runs differ in nothing but deaths; yields the settings."""
    with served_without_change(FakeKasmina) as settings:
        yield settings


def listeners(*pids: int) -> set[str]:
    """Returns on what the processes listen by TCP: loopback, or the addresses as /proc has them."""
    sockets = set[str]()
    for descriptor in (each for pid in pids for each in Path(f"/proc/{pid}/fd").iterdir()):
        with suppress(OSError):
            sockets.add(str(descriptor.readlink()))
    found = set[str]()
    for line in (
        Path("/proc/net/tcp").read_text().splitlines()[1:] + Path("/proc/net/tcp6").read_text().splitlines()[1:]
    ):
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
            address = fields[1].partition(":")[0]
            found.add("loopback" if address.endswith("0100007F") or address == "0" * 24 + "01000000" else address)
    return found


def test_what_operators_do_works_on_the_group(peers: list[str], tmp_path: Path) -> None:
    """Pauses, which are no silence, rollbacks of both tiers, learning rates, checkpoints and profiles."""
    with (
        serve(*GROUP, *ENDLESS, *peers, *LIMITS, "rollback.fast_budget_s=20", cwd=tmp_path) as service,
        stub_of(service) as stub,
    ):
        wait_for(lambda: status(stub).global_step > 100)
        ranks = {rank.rank: (rank.pid, rank.device) for rank in status(stub).ranks}
        wait_for(lambda: all(rank.memory_bytes > 2**20 for rank in status(stub).ranks))
        assert sum(rank.rank_wait_s for rank in status(stub).ranks) > 0
        assert ranks == {rank: (pid, "cpu") for rank, pid in ranks_of(agent_of(service)).items()}
        assert listeners(agent_of(service), *ranks_of(agent_of(service)).values()) == {"loopback"}
        operate(stub, "one")
        stub.AdjustLearningRate(
            admin.AdjustLearningRateRequest(request_id="lr", reason="calm", factor=0.5), timeout=180
        )
        stub.PauseTraining(admin.PauseTrainingRequest(request_id="p", reason="look"), timeout=180)
        step = status(stub).global_step
        time.sleep(4)
        assert status(stub).global_step == step
        operate(stub, "two", profile=False)
        stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="r", reason="go on"), timeout=180)
        wait_for(lambda: status(stub).global_step > step + 50)
        assert status(stub).learning_rates["host"] == pytest.approx(0.0005)
        stub.StopTraining(admin.StopTrainingRequest(request_id="s", reason="enough"), timeout=180)
        wait_for(lambda: status(stub).state == admin.RUN_STATE_FINISHED)
    assert named(service, "tolaria.lane_lost") == []


def test_a_sharded_run_recovers_is_operated_and_goes_on_in_one_process(peers: list[str], tmp_path: Path) -> None:
    """A rank's death is said to be one, both tiers of rollback are proven, and nothing of the run depends on parts."""
    arguments = [*ENDLESS, *peers, *LIMITS, "rollback.fast_budget_s=20"]
    with serve(*GROUP, *arguments, "lane.parallel=fsdp", cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 60)
        os.kill(ranks_of(agent_of(service))[1], signal.SIGKILL)
        wait_for(lambda: len(named(service, "tolaria.lane_recovered")) == 1)
        operate(stub, "one")
        service.terminate()
    assert [line["cause"] for line in named(service, "tolaria.lane_lost")] == ["killed"]
    step = last_checkpoint(tmp_path)[0]
    with serve(*JOB, *arguments, cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > step)
        assert len(status(stub).ranks) == 1
    assert named(service, "tolaria.lane_lost") == []


def operate(stub: TolariaAdminServiceStub, name: str, *, profile: bool = True) -> None:
    """Has a checkpoint and a profile made, and rolls back by both tiers."""
    stub.CreateCheckpoint(admin.CreateCheckpointRequest(request_id=f"c{name}", reason="now"), timeout=180)
    if profile:
        request = admin.CaptureProfileRequest(request_id=f"f{name}", reason="look", active_steps=3)
        assert Path(stub.CaptureProfile(request, timeout=180).path).stat().st_size > 0
    for tier in (1, 2):
        back = stub.TriggerRollback(
            admin.TriggerRollbackRequest(request_id=f"{name}{tier}", tier=tier, reason="odd"),  # type: ignore[arg-type]
            timeout=180,
        )
        assert (back.tier, back.state_digest) == (tier, back.expected_digest)
