"""A real service whose lane dies while another process is ready to take its place."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from leyline.v1 import admin_service_pb2 as admin
from support.processes import Serve, is_alive, serve, status, stub_of
from support.runs_on_disk import last_checkpoint
from support.waiting import wait_for
from tolaria.ranks.local_ranks import children_of

FINITE: Final = [
    "training.job=support.mortal_jobs:Mortal", "training.device=cpu", "training.threads=1", "training.epochs=6",
    "training.deterministic=true", "training.options.samples=320", "training.options.step_s=0.02",
    "service.exit_when_done=true",
]  # fmt: skip
MODES: Final = [
    pytest.param([], 0, id="process"),
    pytest.param(["lane.mode=torchrun", "lane.processes=2"], 2, id="torchrun", marks=pytest.mark.slow),
]


def logged(service: Serve, event: str) -> list[dict[str, Any]]:
    """Returns the log lines of an event."""
    return [line for line in service.events() if line["event"] == event]


def is_ready(pid: int, ranks: int) -> bool:
    """Whether a process has imported PyTorch, and started so many ranks, which have done so, too."""
    children = children_of(pid)
    mapped = [Path(f"/proc/{each}/maps").read_text() for each in (pid, *children)]
    return len(children) == ranks and all("libtorch_cpu" in text for text in mapped)


def is_ready_again(service: Serve, count: int, ranks: int) -> bool:
    """Whether a spare process has been started so often, and the last one is ready."""
    started = logged(service, "spare_lane_started")
    return len(started) == count and is_ready(started[-1]["pid"], ranks)


def has_recovered(service: Serve, count: int) -> bool:
    """Whether the lane has recovered so often."""
    return len(logged(service, "tolaria.lane_recovered")) == count


def ends_with_digest(directory: Path, *settings: str) -> tuple[int, str]:
    """Trains without a death; returns the last step and digest."""
    directory.mkdir()
    with serve(*FINITE, *settings, cwd=directory) as service:
        assert service.wait() == 0
    return last_checkpoint(directory)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "ranks"), MODES)
@pytest.mark.timeout(900)
def test_a_death_costs_neither_a_step_nor_the_import_of_torch(mode: list[str], ranks: int, tmp_path: Path) -> None:
    """The process that was ready trains on, another one is made ready, and the run ends bit-equal; none is left."""
    undisturbed = ends_with_digest(tmp_path / "undisturbed", *mode)
    (tmp_path / "killed").mkdir()
    with serve(*FINITE, *mode, "lane.spare_after_s=0.1", cwd=tmp_path / "killed") as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 20)
        stub.PauseTraining(admin.PauseTrainingRequest(request_id="p", reason="until one is ready"), timeout=180)
        for deaths in (1, 2):
            wait_for(partial(is_ready_again, service, deaths, ranks))
            os.kill(status(stub).ranks[-1].pid, signal.SIGKILL)
            wait_for(partial(has_recovered, service, deaths))
        wait_for(partial(is_ready_again, service, 3, ranks))
        last = logged(service, "spare_lane_started")[-1]["pid"]
        all_ranks = [*children_of(last), *(rank.pid for rank in status(stub).ranks)]
        stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="r", reason="go on"), timeout=180)
        spares = [line["pid"] for line in logged(service, "spare_lane_started")]
        lanes = [line["pid"] for line in logged(service, "lane_started")]
        assert service.wait() == 0
    assert lanes[1:] == spares[:2]
    assert [line["cause"] for line in logged(service, "tolaria.lane_lost")] == ["killed", "killed"]
    wait_for(lambda: not any(map(is_alive, [*lanes, *spares, *all_ranks])))
    assert last_checkpoint(tmp_path / "killed") == undisturbed


@pytest.mark.parametrize(("mode", "ranks"), MODES)
def test_a_killed_service_leaves_no_spare_process(mode: list[str], ranks: int, tmp_path: Path) -> None:
    """It ends with the service, as the lane does."""
    endless = ["training.epochs=100000", "lane.spare_after_s=0.1"]
    with serve(*FINITE, *mode, *endless, cwd=tmp_path) as service:
        wait_for(lambda: logged(service, "spare_lane_started") != [])
        spare = logged(service, "spare_lane_started")[0]["pid"]
        wait_for(lambda: is_ready(spare, ranks))
        spares = [spare, *children_of(spare)]
        assert all(map(is_alive, spares))
        service.process.kill()
        service.wait()
        wait_for(lambda: not any(map(is_alive, spares)))
