"""A real service whose lane dies while another process is ready to take its place."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Final

import pytest

from leyline.v1 import admin_service_pb2 as admin
from support.processes import Serve, is_alive, serve, status, stub_of
from support.runs_on_disk import last_checkpoint
from support.waiting import wait_for

FINITE: Final = [
    "training.job=support.mortal_jobs:Mortal", "training.device=cpu", "training.threads=1", "training.epochs=6",
    "training.deterministic=true", "training.options.samples=320", "training.options.step_s=0.005",
    "service.exit_when_done=true",
]  # fmt: skip
RANKS: Final = ["lane.mode=torchrun", "lane.processes=2"]


def logged(service: Serve, event: str) -> list[dict[str, Any]]:
    """Returns the log lines of an event."""
    return [line for line in service.events() if line["event"] == event]


def ends_with_digest(directory: Path, *settings: str) -> tuple[int, str]:
    """Trains without a death; returns the last step and digest."""
    directory.mkdir()
    with serve(*FINITE, *settings, cwd=directory) as service:
        assert service.wait() == 0
    return last_checkpoint(directory)


@pytest.mark.parametrize("mode", [[], RANKS], ids=["process", "torchrun"])
@pytest.mark.timeout(900)
def test_a_death_costs_neither_a_step_nor_the_import_of_torch(mode: list[str], tmp_path: Path) -> None:
    """The process that was ready trains on, another one is made ready, and the run ends bit-equal; none is left."""
    undisturbed = ends_with_digest(tmp_path / "undisturbed", *mode)
    (tmp_path / "killed").mkdir()
    with serve(*FINITE, *mode, "lane.spare_after_s=0.1", cwd=tmp_path / "killed") as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 20)
        stub.PauseTraining(admin.PauseTrainingRequest(request_id="p", reason="until one is ready"), timeout=60)
        for deaths in (1, 2):
            wait_for(lambda n=deaths: len(logged(service, "spare_lane_started")) == n)
            os.kill(status(stub).ranks[-1].pid, signal.SIGKILL)
            wait_for(lambda n=deaths: len(logged(service, "tolaria.lane_recovered")) == n)
        wait_for(lambda: len(logged(service, "spare_lane_started")) == 3)
        stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="r", reason="go on"), timeout=60)
        spares = [line["pid"] for line in logged(service, "spare_lane_started")]
        lanes = [line["pid"] for line in logged(service, "lane_started")]
        assert service.wait() == 0
    assert lanes[1:] == spares[:2]
    assert [line["cause"] for line in logged(service, "tolaria.lane_lost")] == ["killed", "killed"]
    wait_for(lambda: not any(map(is_alive, [*lanes, *spares])))
    assert last_checkpoint(tmp_path / "killed") == undisturbed


def test_a_killed_service_leaves_no_spare_process(tmp_path: Path) -> None:
    """It ends with the service, as the lane does, also while it imports."""
    with serve(*FINITE, "training.epochs=100000", "lane.spare_after_s=0.1", cwd=tmp_path) as service:
        wait_for(lambda: logged(service, "spare_lane_started") != [])
        spare = logged(service, "spare_lane_started")[0]["pid"]
        assert is_alive(spare)
        service.process.kill()
        service.wait()
        wait_for(lambda: not is_alive(spare))
