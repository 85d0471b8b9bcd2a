"""Runs whose disk refuses to write: checkpoints fail and recover, and training goes on or is held as configured."""

from __future__ import annotations

import errno
import sqlite3
from itertools import product
from typing import Any

import anyio
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from support.disks import WRITES, FailingDisk
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.errors import CheckpointWriteError
from tolaria.journal.rows import FaultRow
from tolaria.rollback.protocol import Rollback
from tolaria.service.readiness import reasons_not_ready

pytestmark = pytest.mark.anyio

FOREVER = 10**9
FAULTS = [
    *product(WRITES, [errno.ENOSPC], [1, FOREVER]),
    *product(["write", "sync", "rename", "sync_directory"], [errno.EIO, errno.EACCES], [FOREVER]),
]


def faulty_run(
    on_failure: str, *, every_steps: int = 5, every_epochs: int = 1, epochs: int = 10**6
) -> tuple[RunUnderTest, FailingDisk]:
    """Returns a run that writes a checkpoint every few steps, and its disk."""
    disk = FailingDisk()
    checkpoint = {
        "every_epochs": every_epochs,
        "every_steps": every_steps,
        "retry_s": 0.02,
        "on_failure": on_failure,
    }
    sections: dict[str, object] = {"checkpoint": checkpoint, "rollback": {"automatic": False}}
    return new_run(FakePeers(), sections=sections, files=disk, epochs=epochs), disk


async def train(run: RunUnderTest, count: int = 3) -> None:
    """Waits until more than `count` further steps are done."""
    step = run.module.global_step
    await run.until(lambda: run.module.global_step > step + count)


def failures(run: RunUnderTest) -> float:
    """Returns the number of failed checkpoints."""
    return run.sample("tolaria.checkpoint.failures_total") or 0.0


@pytest.mark.parametrize("on_failure", ["pause", "continue"])
async def test_a_run_survives_every_failing_call(on_failure: str) -> None:
    """Each kind of call fails once and persistently: it is reported, the run is held if configured, and recovers."""
    run, disk = faulty_run(on_failure)
    async with running(run):
        await train(run)
        for call, code, times in FAULTS:
            fault = (call, errno.errorcode[code], times)
            before = failures(run)
            disk.fail(call, code, times=times)
            await run.until(lambda before=before: failures(run) > before)  # type: ignore[misc]
            assert "tolaria.checkpoint_failed" in run.events, fault
            if times == FOREVER and on_failure == "pause":
                await run.until(lambda: run.state == "PAUSED" and run.core.lane.is_held)
                assert errno.errorcode[code] in run.status.state_reason, fault
            if times == FOREVER and on_failure == "continue":
                await train(run)
                assert run.state == "RUNNING", fault
            if times == FOREVER:
                assert any(errno.errorcode[code] in reason for reason in reasons_not_ready(run.core)), fault
            disk.repair()
            await run.until(lambda: not run.checkpointing.failing and run.state == "RUNNING")
            assert reasons_not_ready(run.core) == [], fault
            await train(run)
        await run.run.stop("enough")
    assert run.state == "FINISHED"


@pytest.mark.parametrize("first", ["operator", "disk"])
async def test_an_operators_pause_survives_the_repair_of_the_disk(first: str) -> None:
    """Whichever came first: after the repair a run that an operator paused stays paused, with the operator's reason."""
    run, disk = faulty_run("pause")
    async with running(run):
        await train(run)
        if first == "operator":
            await run.run.pause("let me look")
        disk.fail("write", errno.ENOSPC)
        if first == "operator":
            with pytest.raises(CheckpointWriteError, match="ENOSPC"):
                await run.run.checkpoint("just in case")
        await run.until(lambda: bool(reasons_not_ready(run.core)) and run.state == "PAUSED")
        if first == "disk":
            await run.run.pause("let me look")
        disk.repair()
        await run.until(lambda: reasons_not_ready(run.core) == [])
        assert (run.state, run.status.state_reason) == ("PAUSED", "let me look")
        step = run.module.global_step
        await anyio.wait_all_tasks_blocked()
        assert run.module.global_step == step
        await run.run.resume("seen")
        await train(run)
        assert run.state == "RUNNING"
        await run.run.stop("enough")


async def test_a_resumed_run_is_held_again_while_the_disk_is_full() -> None:
    """A resume ends the operator's pause; the next failed checkpoint holds the run for the disk."""
    run, disk = faulty_run("pause")
    async with running(run):
        await train(run)
        await run.run.pause("let me look")
        disk.fail("write", errno.ENOSPC)
        with pytest.raises(CheckpointWriteError, match="ENOSPC"):
            await run.run.checkpoint("just in case")
        await run.run.resume("seen")
        await run.until(lambda: run.state == "PAUSED" and "ENOSPC" in run.status.state_reason)
        disk.repair()
        await run.until(lambda: run.state == "RUNNING" and reasons_not_ready(run.core) == [])
        await train(run)
        await run.run.stop("enough")


async def test_a_failed_checkpoint_is_an_incident() -> None:
    """Its stage and errno stay in the journal after the repair."""
    run, disk = faulty_run("continue")
    async with running(run):
        await train(run)
        disk.fail("sync", errno.EIO, times=1)
        await run.until(lambda: failures(run) == 1)
        await run.until(lambda: not run.checkpointing.failing)
        incidents = await run.journal.incidents(10)
        assert [(each.kind, "EIO" in each.reason) for each in incidents] == [("checkpoint_failed", True)]
        await run.run.stop("enough")


@pytest.mark.parametrize("on_failure", ["pause", "continue"])
async def test_the_end_of_a_run_on_a_full_disk(on_failure: str) -> None:
    """With on_failure=pause the run does not finish before its last checkpoint is written; else it does without."""
    run, disk = faulty_run(on_failure, every_steps=0, every_epochs=4, epochs=4)
    disk.fail("write", errno.ENOSPC)
    async with running(run):
        if on_failure == "pause":
            await run.until(lambda: run.state == "PAUSED")
            assert run.module.global_step == 4 * 8
            assert any("ENOSPC" in reason for reason in reasons_not_ready(run.core))
            disk.repair()
        await run.until(lambda: run.state == "FINISHED")
        points = await run.journal.kept_points()
        assert [row.global_step for row in points][-1:] == ([32] if on_failure == "pause" else [])


async def test_a_full_journal_is_reported_and_written_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints fail and /readyz says why, rollbacks go on; with space again every row is in the journal."""
    connections: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def recorded(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connections.append(connect(*arguments, **options))
        return connections[-1]

    monkeypatch.setattr(sqlite3, "connect", recorded)
    run, _ = faulty_run("continue")

    def limit_pages(count: int) -> None:
        connections[-1].execute(f"PRAGMA max_page_count = {count}").fetchall()

    async with running(run):
        await train(run)
        await anyio.to_thread.run_sync(limit_pages, 1)
        run.journal.note(FaultRow("f", 1, "run", "test", 1, "stage", "x" * 100_000))
        await run.until(lambda: len(reasons_not_ready(run.core)) == 2)
        back = await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, None, "odd", "operator"))
        assert back.state_digest == back.expected_digest
        await train(run)
        await anyio.to_thread.run_sync(limit_pages, 10**6)
        await run.until(lambda: reasons_not_ready(run.core) == [])
        incidents = await run.journal.incidents(100)
        assert {"test", "checkpoint_failed"} <= {each.kind for each in incidents}
        await run.run.stop("enough")
