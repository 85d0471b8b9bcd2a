from __future__ import annotations

import errno
from itertools import product

import anyio
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from support.disks import WRITES, FailingDisk
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.errors import CheckpointWriteError
from tolaria.journal.rows import FaultRow
from tolaria.service.host import Host
from tolaria.training.recovery.rollbacks import Asked

pytestmark = pytest.mark.anyio

FOR_GOOD = 10**9
FAULTS = [
    *product(WRITES, [errno.ENOSPC], [1, FOR_GOOD]),
    *product(["write", "sync", "rename", "sync_directory"], [errno.EIO, errno.EACCES], [FOR_GOOD]),
]


def faulty_run(
    on_failure: str, *, every_steps: int = 5, every_epochs: int = 1, epochs: int = 10**6
) -> tuple[RunUnderTest, FailingDisk, Host]:
    """A run that checkpoints every few steps on a disk that the test can break; the host is asked what it tells."""
    disk = FailingDisk()
    checkpoint = {
        "every_epochs": every_epochs,
        "every_steps": every_steps,
        "retry_s": 0.02,
        "on_failure": on_failure,
    }
    sections: dict[str, object] = {"checkpoint": checkpoint, "rollback": {"automatic": False}}
    run = new_run(FakePeers(), sections=sections, files=disk, epochs=epochs)
    host = Host(run.parts)
    host._checkpoints = run.loop.checkpoints
    return run, disk, host


async def steps_on(run: RunUnderTest, count: int = 3) -> None:
    """Until so many more updates are done."""
    step = run.rig.global_step
    await run.until(lambda: run.rig.global_step > step + count)


def failures(run: RunUnderTest) -> float:
    """Checkpoints that have failed."""
    return run.metrics.registry.get_sample_value("tolaria.checkpoint.failures_total") or 0.0


async def failed_again(run: RunUnderTest, before: float) -> None:
    """Until there is a further failure."""
    await run.until(lambda: failures(run) > before)


@pytest.mark.parametrize("on_failure", ["pause", "continue"])
async def test_no_failing_call_ends_a_run_and_each_is_got_over(on_failure: str) -> None:
    """Every call fails with every errno, once and for good: told, held or not as set, mended, and training goes on."""
    run, disk, host = faulty_run(on_failure)
    async with running(run):
        await steps_on(run)
        for call, code, times in FAULTS:
            what = (call, errno.errorcode[code], times)
            before = failures(run)
            disk.fail(call, code, times=times)
            await failed_again(run, before)
            assert "tolaria.checkpoint_failed" in run.events, what
            if times == FOR_GOOD and on_failure == "pause":
                await run.until(lambda: run.state == "PAUSED" and run.loop._link.standstill.standing)
                assert errno.errorcode[code] in run.progress.state_reason, what
            if times == FOR_GOOD and on_failure == "continue":
                await steps_on(run)
                assert run.state == "RUNNING", what
            if times == FOR_GOOD:
                assert any(errno.errorcode[code] in why for why in host._reasons_not_ready()), what
            disk.mend()
            await run.until(lambda: not run.loop.checkpoints.failing and run.state == "RUNNING")
            assert host._reasons_not_ready() == [], what
            await steps_on(run)
        await run.loop.stop("enough")
    assert run.state == "FINISHED"


@pytest.mark.parametrize("first", ["operator", "disk"])
async def test_an_operators_pause_survives_the_mending_of_the_disk(first: str) -> None:
    """Whichever came first: once there is space again a run that an operator has paused stays so, with his reason."""
    run, disk, host = faulty_run("pause")
    async with running(run):
        await steps_on(run)
        if first == "operator":
            await run.loop.pause("let me look")
        disk.fail("write", errno.ENOSPC)
        if first == "operator":
            with pytest.raises(CheckpointWriteError, match="ENOSPC"):
                await run.loop.checkpoint("just in case")
        await run.until(lambda: bool(host._reasons_not_ready()) and run.state == "PAUSED")
        if first == "disk":
            await run.loop.pause("let me look")
        disk.mend()
        await run.until(lambda: host._reasons_not_ready() == [])
        assert (run.state, run.progress.state_reason) == ("PAUSED", "let me look")
        step = run.rig.global_step
        await anyio.wait_all_tasks_blocked()
        assert run.rig.global_step == step
        run.loop.resume("seen")
        await steps_on(run)
        assert run.state == "RUNNING"
        await run.loop.stop("enough")


async def test_a_run_that_an_operator_lets_go_on_is_held_while_the_disk_is_still_full() -> None:
    """What he paused it for is over, what the disk holds it for is not."""
    run, disk, host = faulty_run("pause")
    async with running(run):
        await steps_on(run)
        await run.loop.pause("let me look")
        disk.fail("write", errno.ENOSPC)
        with pytest.raises(CheckpointWriteError, match="ENOSPC"):
            await run.loop.checkpoint("just in case")
        run.loop.resume("seen")
        await run.until(lambda: run.state == "PAUSED" and "ENOSPC" in run.progress.state_reason)
        disk.mend()
        await run.until(lambda: run.state == "RUNNING" and host._reasons_not_ready() == [])
        await steps_on(run)
        await run.loop.stop("enough")


async def test_what_failed_is_on_record() -> None:
    """Each failure is an incident of the run, with its stage and the system's word, also after the mending."""
    run, disk, _ = faulty_run("continue")
    async with running(run):
        await steps_on(run)
        disk.fail("sync", errno.EIO, times=1)
        await run.until(lambda: failures(run) == 1)
        await run.until(lambda: not run.loop.checkpoints.failing)
        incidents = await run.parts.archive.incidents(10)
        assert [(each.kind, "EIO" in each.reason) for each in incidents] == [("checkpoint_failed", True)]
        await run.loop.stop("enough")


@pytest.mark.parametrize("on_failure", ["pause", "continue"])
async def test_a_run_that_comes_to_its_end_on_a_full_disk(on_failure: str) -> None:
    """Told to stand without checkpoints it does not end before its last one is written; else it ends without."""
    run, disk, host = faulty_run(on_failure, every_steps=0, every_epochs=4, epochs=4)
    disk.fail("write", errno.ENOSPC)
    async with running(run):
        if on_failure == "pause":
            await run.until(lambda: run.state == "PAUSED")
            assert run.rig.global_step == 4 * 8
            assert any("ENOSPC" in why for why in host._reasons_not_ready())
            disk.mend()
        await run.until(lambda: run.state == "FINISHED")
        points = await run.parts.archive.restore_points()
        assert [row.global_step for row in points][-1:] == ([32] if on_failure == "pause" else [])


async def test_a_full_journal_is_told_and_written_again() -> None:
    """Its disk is full: checkpoints fail, commands and rollbacks go on, /readyz says so; later nothing is missing."""
    run, _, host = faulty_run("continue")
    storage = run.parts.ground.storage

    def pages(count: int) -> None:
        storage.journal._connection.execute(f"PRAGMA max_page_count = {count}").fetchall()

    async with running(run):
        await steps_on(run)
        await anyio.to_thread.run_sync(pages, 1)
        run.parts.archive.note(FaultRow("f", 1, "run", "test", 1, "stage", "x" * 100_000))
        await run.until(lambda: len(host._reasons_not_ready()) == 2)
        outcome = await run.loop.roll_back(Asked(ROLLBACK_TIER_FAST, None, "odd", "operator"))
        assert outcome.state_digest == outcome.expected_digest
        await steps_on(run)
        await anyio.to_thread.run_sync(pages, 10**6)
        await run.until(lambda: host._reasons_not_ready() == [])
        incidents = await run.parts.archive.incidents(100)
        assert {"test", "checkpoint_failed"} <= {each.kind for each in incidents}
        await run.loop.stop("enough")
