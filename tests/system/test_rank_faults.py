"""A real service whose lane is a group of two ranks: what one rank alone does wrong, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grpc
import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT
from support.groups import GROUP, named
from support.peers import FakeKasmina, served_without_change
from support.processes import serve, status, stub_of
from support.waiting import wait_for

ENDLESS: Final = ["training.epochs=100000000", "training.options.step_s=0.001", "training.options.lr=0.001"]


@pytest.fixture(scope="module")
def peers() -> Iterator[list[str]]:
    """Runs a Tamiyo that changes nothing; yields the settings."""
    with served_without_change(FakeKasmina) as settings:
        yield settings


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_that_holds_its_gil_is_found_and_an_operator_can_look_at_all_ranks(
    peers: list[str], tmp_path: Path
) -> None:
    """The stacks of both ranks say who waits for whom, in the incident too; the same when training is halted."""
    limits = ["emergency.heartbeat_timeout_s=8", "emergency.phase_timeout_s=12"]
    how = ["training.options.at=40", "training.options.how=gil", "training.options.on=1"]
    with serve(*GROUP, *ENDLESS, *limits, *how, *peers, cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: named(service, "tolaria.lane_recovered") != [])
        incidents = str(stub.ListIncidents(admin.ListIncidentsRequest(), timeout=180).incidents)
        assert "rank 0: all_reduce (distributed_c10d.py:" in incidents
        assert "; rank 1: die (mortal_jobs.py:" in incidents
        stacks = (tmp_path / "state" / "stacks.txt").read_text()
        assert stacks.index("rank 0:\nMain thread") < stacks.index("rank 1:\nMain thread")
        assert "in die_if_due" in stacks
        wait_for(lambda: status(stub).global_step > 60)
        trace_both(stub, tmp_path / "state" / "traces")
        halt = admin.RaiseEmergencyRequest(request_id="h", reason="look", level=EMERGENCY_LEVEL_HALT)
        stub.RaiseEmergency(halt, timeout=180)
        wait_for(lambda: len(named(service, "lane_stacks")) == 2)
        assert named(service, "lane_stacks")[-1]["why"] == "halted: emergency: look"
        later = (tmp_path / "state" / "stacks.txt").read_text()[len(stacks) :]
        assert later.count("Main thread") == 2
        assert later.count("in _serve") == 2


def trace_both(stub: TolariaAdminServiceStub, traces: Path) -> None:
    """Has each rank profiled; both traces are kept here, and say which process they are of. There is no third rank."""
    pids = {rank.rank: rank.pid for rank in status(stub).ranks}
    for rank in (1, 0):
        request = admin.CaptureProfileRequest(request_id=f"p{rank}", reason="slow", active_steps=3, rank=rank)
        path = Path(stub.CaptureProfile(request, timeout=180).path)
        assert (path.parent, "-rank1." in path.name) == (traces, rank == 1)
        events = json.loads(path.read_text())["traceEvents"]
        assert any(event.get("pid") == pids[rank] and event.get("name") == "optimizer" for event in events)
    request = admin.CaptureProfileRequest(request_id="p2", reason="slow", active_steps=3, rank=2)
    with pytest.raises(grpc.RpcError, match="rank: must be below 2, is 2"):
        stub.CaptureProfile(request, timeout=180)
    assert len(list(traces.iterdir())) == 2
