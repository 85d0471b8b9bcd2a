"""A process of the lane that is started before it is needed."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from support.processes import is_alive
from support.script_lanes import ScriptLane, running_script
from tolaria.config import Settings
from tolaria.lane.messages import LaneLost, LaneRestarted
from tolaria.transport.spare_lane import SpareLane

pytestmark = pytest.mark.anyio

DIES_ON_DEMAND = """
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
    """Where each process that has got its order leaves a file, named by its id, and finds the file `die`."""
    monkeypatch.setenv("FOLDER_OF_TEST", str(tmp_path))
    return tmp_path


async def spare_of(logs: list[Any], count: int = 1) -> int:
    """Waits until that many spare processes have been started; returns the id of the last one."""
    with anyio.fail_after(180):
        while len(found := [line["pid"] for line in logs if line["event"] == "spare_lane_started"]) < count:
            await anyio.sleep(0.005)
    return int(found[count - 1])


async def until_logged(logs: list[Any], event: str) -> None:
    """Waits for an event in the log."""
    with anyio.fail_after(180):
        while not any(line["event"] == event for line in logs):
            await anyio.sleep(0.005)


async def score(pid: int) -> int:
    """Returns how soon the system ends a process that has no memory."""
    return int(await anyio.Path(f"/proc/{pid}/oom_score_adj").read_text())


async def built(folder: Path, pid: int) -> bool:
    """Whether a process has got its order."""
    return await anyio.Path(folder, str(pid)).exists()


async def gone(pid: int) -> None:
    """Waits for the end of a process."""
    with anyio.fail_after(180):
        while await anyio.to_thread.run_sync(is_alive, pid):
            await anyio.sleep(0.005)


async def died(lane: ScriptLane, folder: Path, times: int) -> None:
    """Has the lane die, and waits until another one is there."""
    await anyio.Path(folder, "die").touch()
    await lane.until(LaneRestarted, times)


async def test_it_takes_the_place_of_a_lane_that_dies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again; until then it has no order, and the system would rather end it than the lane."""
    with capture_logs() as logs:
        async with running_script(DIES_ON_DEMAND, monkeypatch, spare_after_s=0.01) as lane:
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
        async with running_script(DIES_ON_DEMAND, monkeypatch, spare_after_s=0.01) as lane:
            pid = await spare_of(logs)
            os.kill(pid, 9)
            await until_logged(logs, "spare_lane_failed")
            await anyio.sleep(0.1)
            assert not any(isinstance(event, LaneLost) for event in lane.events)
            assert [line["pid"] for line in logs if line["event"] == "spare_lane_started"] == [pid]
            await died(lane, folder, 1)
            assert await spare_of(logs, 2) != pid


async def test_one_that_has_ended_is_not_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are killed at once, as by `pkill`: that is one death of the lane."""
    with capture_logs() as logs:
        async with running_script(DIES_ON_DEMAND, monkeypatch, spare_after_s=0.01) as lane:
            pid = await spare_of(logs)
            os.kill(pid, 9)
            await died(lane, folder, 1)
            await spare_of(logs, 2)
            assert [type(event) for event in lane.events if isinstance(event, LaneLost)] == [LaneLost]


async def test_one_that_is_stopped_is_not_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would do nothing for as long as a lane may be silent; it is ended, and the lane started without it."""
    with capture_logs() as logs:
        async with running_script(DIES_ON_DEMAND, monkeypatch, spare_after_s=0.01) as lane:
            pid = await spare_of(logs)
            os.kill(pid, signal.SIGSTOP)
            await died(lane, folder, 1)
            await gone(pid)
            assert not await built(folder, pid)
            assert await spare_of(logs, 2) != pid
    assert "it is stopped, as by a debugger" in [line.get("error") for line in logs]


async def test_a_score_that_cannot_be_set_back_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane would be the first process that the system ends."""
    with capture_logs() as logs:
        async with running_script(DIES_ON_DEMAND, monkeypatch, spare_after_s=0.01) as lane:
            await spare_of(logs)
            await until_score_is_set(logs)
            monkeypatch.setattr(Path, "write_text", refused)
            await died(lane, folder, 1)
    assert any("the first to be killed" in line.get("error", "") for line in logs)


async def until_score_is_set(logs: list[Any]) -> None:
    """Waits until the system would end the spare process first."""
    pid = await spare_of(logs)
    with anyio.fail_after(180):
        while await score(pid) != 1000:
            await anyio.sleep(0.005)


def refused(path: Path, *_: object, **__: object) -> int:
    """Refuses to write, as the system does where a process may not have itself spared."""
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize(("kills", "kind"), [(1, "exited"), (2, "out_of_memory")])
async def test_want_of_memory_that_ended_the_spare_process_is_no_cause_of_the_lanes_end(
    kills: int, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control group counts all kills, of which that one is left out, and not the lane's."""
    counted = [0]
    monkeypatch.setattr("tolaria.transport.lane_process.oom_kills", lambda: counted[0])
    with capture_logs() as logs:
        async with running_script(DIES_ON_DEMAND, monkeypatch, spare_after_s=0.01) as lane:
            pid = await spare_of(logs)
            counted[0] = kills
            os.kill(pid, 9)
            await until_logged(logs, "spare_lane_failed")
            await died(lane, folder, 1)
            lost = await lane.until(LaneLost)
            assert isinstance(lost, LaneLost)
            assert lost.kind == kind


@pytest.mark.parametrize("why", ["little memory", "killed together"])
async def test_there_is_none_where_it_could_do_harm(why: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short, or where all processes of a container are killed for the memory of one."""
    left = 2**31 - (why == "little memory")
    monkeypatch.setattr("tolaria.transport.spare_lane.memory_left", lambda: left)
    monkeypatch.setattr("tolaria.transport.spare_lane.kills_together", lambda: why == "killed together")
    with capture_logs() as logs:
        async with running_script(DIES_ON_DEMAND, monkeypatch, spare_after_s=0.01) as lane:
            await until_logged(logs, "spare_lane_left_out")
            await died(lane, folder, 1)
    assert not any(line["event"] == "spare_lane_started" for line in logs)


def descriptors() -> int:
    """Returns how many descriptors are open, without those of objects that nothing uses any more."""
    gc.collect()
    return len([*Path("/proc/self/fd").iterdir()])


async def never() -> None:
    """Is not called."""
    raise AssertionError


def spare(monkeypatch: pytest.MonkeyPatch, script: str, **lane: object) -> SpareLane:
    """Returns what keeps a process that is this script."""
    monkeypatch.setattr("tolaria.transport.lane_start.PROGRAM", (sys.executable, "-c", script))
    return SpareLane(Settings.model_validate({"lane": {"spare_after_s": 0.01, **lane}}), 60.0)


async def test_there_is_none_without_the_setting_or_for_a_lane_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it returns, and has started nothing."""
    for settings, is_due in (({"spare_after_s": 0.0}, True), ({}, False)):
        found = spare(monkeypatch, "", **settings)
        await found.keep(lambda is_due=is_due: is_due, never)  # type: ignore[misc]
        assert found.pid == 0


ANNOUNCES = """
import json, os, time
print(json.dumps({"lane": os.getpid()}), flush=True)
time.sleep(3600)
"""


async def test_there_is_one_at_a_time_and_none_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a lane is built while one is being started; nothing stays open."""
    before = await anyio.to_thread.run_sync(descriptors)
    found = spare(monkeypatch, ANNOUNCES)
    with capture_logs() as logs:
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(found.keep, lambda: True, never)
            pid = await spare_of(logs)
            await anyio.sleep(0.2)
            tasks.cancel_scope.cancel()
    assert [line["pid"] for line in logs if line["event"] == "spare_lane_started"] == [pid]
    await gone(pid)
    assert await anyio.to_thread.run_sync(descriptors) == before


async def test_one_that_is_being_started_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the service ends, whether it has announced itself or not."""
    before = await anyio.to_thread.run_sync(descriptors)
    found = spare(monkeypatch, "import time; time.sleep(3600)")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.keep, lambda: True, never)
        with anyio.fail_after(180):
            while not found.pid:
                await anyio.sleep(0.005)
        assert await found.take() is None
        tasks.cancel_scope.cancel()
    await gone(found.pid)
    assert await anyio.to_thread.run_sync(descriptors) == before
