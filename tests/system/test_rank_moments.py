"""Deaths of ranks, and of their workers, at chosen moments and in chosen ways: cells of a matrix."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Final

import grpc
import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from support.groups import agent_of, pass_lost_batches
from support.peers import FakeKasmina, served_without_change
from support.processes import Serve, is_alive, serve, status, stub_of
from support.runs_on_disk import last_checkpoint
from support.waiting import wait_for
from tolaria.ranks.local_ranks import ranks_of

JOB: Final = ["training.job=support.mortal_jobs:MortalAt", "training.device=cpu", "training.threads=1"]
RUN: Final = [*JOB, "training.deterministic=true", "training.options.samples=160", "lane.mode=torchrun"]
LIMITS: Final = [
    *("emergency.heartbeat_timeout_s=8", "emergency.phase_timeout_s=12", "lane.restarts_max=1000"),
    *("lane.restart_pause_max_s=0.2", "lane.processes=2", "rollback.every_steps=5", "checkpoint.every_steps=50"),
]

LEADERS: Final = ("checkpoint", "snapshot")
"""Moments that only the leader has."""

MOMENTS: Final = ("step", "evaluation", "rollback", "build", "worker", *LEADERS)
WAYS: Final = ("kill", "segv", "exit", "raise", "stop", "hang", "gil")
SLOW: Final = frozenset(product(("build",), ("stop", "hang", "gil")))
"""Cells that take minutes: a job may build for as long as three times its first build."""

MATRIX: Final = [
    (moment, rank, way)
    for moment, rank, way in product(MOMENTS, (0, 1), WAYS)
    if (moment, way) not in SLOW and not (rank and moment in LEADERS)
]
ALWAYS: Final = [("build", 1, "segv"), ("worker", 1, "kill"), ("checkpoint", 0, "exit"), ("rollback", 1, "kill")]
"""A kind of moment each that `test_rank_deaths.py` has not; the other cells are drawn."""

LONG, IN_CI = 200, 10
"""How many cells there are in all."""


@pytest.fixture
def peers() -> Iterator[list[str]]:
    """Runs a Tamiyo that changes nothing; yields the settings."""
    with served_without_change(FakeKasmina) as settings:
        yield settings


def recovered(service: Serve) -> int:
    """Returns how often the lane has recovered."""
    return sum(line["event"] == "tolaria.lane_recovered" for line in service.events())


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_death_at_any_moment_costs_more_than_time(
    request: pytest.FixtureRequest, peers: list[str], tmp_path: Path
) -> None:
    """The service answers all along, and the run ends bit-equal to one without a death; no process is left."""
    rng = random.Random(11)
    count = LONG if request.config.getoption("--long") else IN_CI
    cells = [*ALWAYS, *(rng.choice(MATRIX) for _ in range(count - len(ALWAYS)))]
    epochs = f"training.epochs={10 + 2 * len(cells)}"
    arguments = [*RUN, *LIMITS, *peers, epochs, "service.exit_when_done=true"]
    with serve(*arguments, "training.options.step_s=0.03", cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 0)
        seen = set[int]()
        for number, cell in enumerate(cells):
            seen.update(ranks_of(agent_of(service)).values())
            die(service, stub, cell, number, tmp_path)
        assert service.wait(600) == 0
        wait_for(lambda: not any(map(is_alive, seen)))
    (tmp_path / "calm").mkdir()
    with serve(*arguments, cwd=tmp_path / "calm") as service:
        assert service.wait(900) == 0
    assert last_checkpoint(tmp_path) == last_checkpoint(tmp_path / "calm")


def die(
    service: Serve, stub: TolariaAdminServiceStub, cell: tuple[str, int, str], number: int, directory: Path
) -> None:
    """Has a process die as a cell of the matrix says, and waits until the run has gone on."""
    (moment, _, _), deaths, step = cell, recovered(service), status(stub).global_step
    (directory / "order.new").write_text(" ".join(map(str, cell)))
    (directory / "order.new").rename(directory / "order")
    if moment == "build":
        os.kill(ranks_of(agent_of(service))[1], signal.SIGKILL)
    elif moment == "checkpoint":
        with pytest.raises(grpc.RpcError, match="the lane has died"):
            stub.CreateCheckpoint(admin.CreateCheckpointRequest(request_id=f"c{number}", reason="now"), timeout=180)
    elif moment == "rollback":
        wait_for(lambda: any(point.stable for point in points(stub)))
        with suppress(grpc.RpcError):  # it may be carried out after the recovery
            stub.TriggerRollback(admin.TriggerRollbackRequest(request_id=f"r{number}", reason="odd"), timeout=180)
    wait_for(lambda: not (directory / "order").exists())
    wait_for(lambda: status(stub).state == admin.RUN_STATE_RUNNING and recovered(service) > deaths)
    pass_lost_batches(service)
    wait_for(lambda: status(stub).global_step > step)


def points(stub: TolariaAdminServiceStub) -> Sequence[admin.RestorePoint]:
    """Returns the restore points."""
    return stub.ListRestorePoints(admin.ListRestorePointsRequest(), timeout=180).restore_points
