"""A process of the lane that is started before it is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from support.processes import is_alive
from support.script_lanes import ScriptLane, running_script
from tolaria.lane.messages import LaneLost, LaneRestarted

pytestmark = pytest.mark.anyio

DIES_AS_TOLD = """
folder = os.environ["FOLDER_OF_TEST"]
open(f"{folder}/{os.getpid()}", "w").close()
say_ready()
while not os.path.exists(f"{folder}/die"): time.sleep(0.005)
os.unlink(f"{folder}/die")
print("the disk is full", file=sys.stderr, flush=True)
os._exit(3)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where each process that was told what to build leaves a file, named by its id, and finds the file `die`."""
    monkeypatch.setenv("FOLDER_OF_TEST", str(tmp_path))
    return tmp_path


async def spare_of(logs: list[Any], count: int = 1) -> int:
    """Waits until that many spare processes have been started; returns the id of the last one."""
    with anyio.fail_after(60):
        while len(found := [line["pid"] for line in logs if line["event"] == "spare_lane_started"]) < count:
            await anyio.sleep(0.005)
    return int(found[count - 1])


async def score(pid: int) -> int:
    """Returns how soon the system ends a process that has no memory."""
    return int(await anyio.Path(f"/proc/{pid}/oom_score_adj").read_text())


async def built(folder: Path, pid: int) -> bool:
    """Whether a process was told what to build."""
    return await anyio.Path(folder, str(pid)).exists()


async def gone(pid: int) -> None:
    """Waits for the end of a process."""
    with anyio.fail_after(60):
        while await anyio.to_thread.run_sync(is_alive, pid):
            await anyio.sleep(0.005)


async def died(lane: ScriptLane, folder: Path, times: int) -> None:
    """Has the lane die, and waits until another one is there."""
    await anyio.Path(folder, "die").touch()
    await lane.until(LaneRestarted, times)


async def test_it_takes_the_place_of_a_lane_that_dies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again; until then it is told nothing, and the system would rather end it than the lane."""
    with capture_logs() as logs:
        async with running_script(DIES_AS_TOLD, monkeypatch, spare_after_s=0.01) as lane:
            for times in (1, 2):
                pid = await spare_of(logs, times)
                assert not await built(folder, pid)
                assert await score(pid) == 1000
                await died(lane, folder, times)
                assert await built(folder, pid)
                assert await score(pid) == await score(os.getpid())
            lost = [event for event in lane.events if isinstance(event, LaneLost)]
            assert [(each.kind, each.generation) for each in lost] == [("exited", 1), ("exited", 2)]
            assert {each.cause for each in lost} == {"it ended with code 3: the disk is full"}
            last = await spare_of(logs, 3)
        await gone(last)
    assert not await built(folder, last)


async def test_one_that_ends_is_no_loss_and_is_not_replaced_before_the_lane(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane trains on, and when it dies it is started as without a spare process."""
    with capture_logs() as logs:
        async with running_script(DIES_AS_TOLD, monkeypatch, spare_after_s=0.01) as lane:
            pid = await spare_of(logs)
            os.kill(pid, 9)
            with anyio.fail_after(60):
                while not any(line["event"] == "spare_lane_failed" for line in logs):
                    await anyio.sleep(0.005)
            await anyio.sleep(0.1)
            assert not any(isinstance(event, LaneLost) for event in lane.events)
            assert [line["pid"] for line in logs if line["event"] == "spare_lane_started"] == [pid]
            await died(lane, folder, 1)
            assert await spare_of(logs, 2) != pid


async def test_want_of_memory_that_ended_the_spare_process_is_no_cause_of_the_lanes_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kills of the control group are counted again."""
    kills = [0]
    monkeypatch.setattr("tolaria.transport.lane_process.oom_kills", lambda: kills[0])
    with capture_logs() as logs:
        async with running_script(DIES_AS_TOLD, monkeypatch, spare_after_s=0.01) as lane:
            pid = await spare_of(logs)
            kills[0] = 1
            os.kill(pid, 9)
            with anyio.fail_after(60):
                while not any(line["event"] == "spare_lane_failed" for line in logs):
                    await anyio.sleep(0.005)
            await died(lane, folder, 1)
            lost = await lane.until(LaneLost)
            assert isinstance(lost, LaneLost)
            assert lost.kind == "exited"


@pytest.mark.parametrize("why", ["no memory is left", "the setting is 0", "the lane has gone before"])
async def test_there_is_none_where_it_could_do_harm(why: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one for a lane that is not there any more."""
    if why == "no memory is left":
        monkeypatch.setattr("tolaria.transport.spare_lane.memory_left", lambda: 2**31 - 1)
    after_s = {"the setting is 0": 0.0, "the lane has gone before": 0.5}.get(why, 0.01)
    with capture_logs() as logs:
        async with running_script(DIES_AS_TOLD, monkeypatch, spare_after_s=after_s, restarts_max=1) as lane:
            if why == "the lane has gone before":
                await died(lane, folder, 1)
                await anyio.Path(folder, "die").touch()
                await anyio.sleep(0.5)
            await anyio.sleep(0.3)
    assert not any(line["event"] == "spare_lane_started" for line in logs)
    assert any(line["event"] == "spare_lane_left_out" for line in logs) == (why == "no memory is left")
