"""Runs whose validation accuracy collapses, and which roll back automatically."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT
from leyline.v1.state_pb2 import SystemStatePacket
from support.checkpointing import Disk
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.journal.rows import RollbackRow

pytestmark = pytest.mark.anyio

EPOCHS, STEPS = 5, 8
ENDED = {"FINISHED", "FAILED", "HALTED"}


class CheckpointingPeers(FakePeers):
    """Peers that have a checkpoint made at every boundary, which waits for it: exactly of the validated state.

    Attributes:
        run: the run; None: no checkpoint is made.
        after_checkpoint: called with the epoch after its checkpoint, before the boundary continues.
    """

    def __init__(self) -> None:
        super().__init__(self._checkpoint)
        self.run: RunUnderTest | None = None
        self.after_checkpoint: Callable[[int], Awaitable[None]] | None = None

    async def _checkpoint(self, state: SystemStatePacket) -> None:
        if self.run is not None:
            await self.run.run.checkpoint("a good epoch")
        if self.after_checkpoint is not None:
            await self.after_checkpoint(state.current_epoch)


def collapsing_run(
    *epochs: int,
    times: int = 1,
    gated: tuple[int, ...] = (),
    checkpoints: bool = True,
    every_epochs: int = 0,
    disk: Disk | None = None,
) -> tuple[RunUnderTest, CheckpointingPeers]:
    """Returns a run whose accuracy collapses `times` times in each of these epochs, and its peers."""
    rollback = {"automatic": True, "full_budget_s": 20.0, "automatic_max": 2}
    peers = CheckpointingPeers()
    run = new_run(
        peers,
        job="CollapsingJob",
        sections={"rollback": rollback, "checkpoint": {"every_epochs": every_epochs}},
        files=disk,
        epochs=EPOCHS,
        deterministic=True,
        options={"collapses": list(epochs), "times": times, "gated": list(gated)},
    )
    peers.run = run if checkpoints else None
    return run, peers


async def rollbacks_of(run: RunUnderTest) -> list[tuple[str, int]]:
    """Returns tier and restored step of each rollback in the journal."""
    rows = await anyio.to_thread.run_sync(run.storage.journal.rows, RollbackRow)
    return [(row.tier, row.restored_step) for row in rows]


async def finished(run: RunUnderTest) -> None:
    """Runs to the end."""
    async with running(run):
        await run.until(lambda: run.state in ENDED)


@pytest.mark.parametrize("epoch", [2, 3, EPOCHS])
async def test_a_collapse_is_undone_from_disk(epoch: int) -> None:
    """Also in the last epoch: one full rollback, every epoch counted, and the controller gets no bad one."""
    run, peers = collapsing_run(epoch)
    async with running(run):
        await run.until(lambda: run.state in ENDED)
        assert await rollbacks_of(run) == [("full", (epoch - 1) * STEPS)]
    assert run.state == "FINISHED"
    assert run.module.global_step == EPOCHS * STEPS
    assert (run.status.rollbacks, run.job.collapsed) == (1, 1)
    reported = [(state.current_epoch, state.global_step) for state in peers.states]  # none in conservative mode
    assert reported[: epoch - 1] == [(n, n * STEPS) for n in range(1, epoch)]
    assert reported == sorted(set(reported))
    assert all(state.validation_accuracy > 0.5 for state in peers.states)
    assert run.status.last_epoch is not None
    assert run.status.last_epoch.epoch == EPOCHS


async def test_a_checkpoint_from_within_the_collapsed_epoch_is_no_target() -> None:
    """Its state may be as bad as the epoch's end; the rollback supersedes it."""
    run, _ = collapsing_run(3, gated=(3,))
    async with running(run), anyio.create_task_group() as tasks:
        await anyio.to_thread.run_sync(run.job.entered.acquire)
        while run.module.global_step < 2 * STEPS + 5:
            await anyio.to_thread.run_sync(run.job.entered.acquire)
        tasks.start_soon(run.run.checkpoint, "within")
        await anyio.wait_all_tasks_blocked()
        run.job.passes.release()
        while len(await run.journal.kept_points()) < 3:
            await anyio.sleep(0.002)
        run.job.passes.release(100)
        await run.until(lambda: run.state in ENDED)
        assert await rollbacks_of(run) == [("full", 2 * STEPS)]
    assert (run.state, run.module.global_step) == ("FINISHED", EPOCHS * STEPS)


async def test_a_collapse_that_rollbacks_do_not_repair_halts() -> None:
    """The budget of automatic rollbacks is spent; the boundary of the bad epoch is never crossed."""
    run, peers = collapsing_run(3, times=10)
    await finished(run)
    assert run.state == "HALTED"
    assert run.safety.controller.state.level == EMERGENCY_LEVEL_HALT
    assert [state.current_epoch for state in peers.states] == [1, 2]
    assert run.status.rollbacks == 2


async def test_without_a_checkpoint_a_collapse_is_reported_and_training_goes_on() -> None:
    """There is no restore point: the failed rollback is an event, and the run finishes."""
    run, _ = collapsing_run(3, checkpoints=False)
    await finished(run)
    assert (run.state, run.status.rollbacks) == ("FINISHED", 0)
    assert "tolaria.rollback.restore_failed" in run.events


@pytest.mark.parametrize("held", [False, True])
async def test_a_rollback_into_the_collapsed_epoch_trains_the_rest_of_it(held: bool) -> None:
    """A late checkpoint of a healthy epoch may be some steps into the next one: each epoch is trained and asked once.

    Also for a lane that was held before it had left the epoch.
    """
    disk = Disk()
    run, peers = collapsing_run(3, gated=(3,), every_epochs=2, disk=disk)
    async with running(run), anyio.create_task_group() as tasks:

        async def occupy_writer(epoch: int) -> None:
            """Delays the periodic checkpoint of the second epoch."""
            if epoch == 2:
                await run.until(lambda: run.core.foundation.writer.pending == 0)
                disk.gate.clear()
                tasks.start_soon(run.run.checkpoint, "slow")
                await run.until(lambda: run.core.foundation.writer.pending > 0)

        peers.after_checkpoint = occupy_writer
        await run.until(lambda: run.module.global_step == 2 * STEPS + 5)
        disk.gate.set()
        await run.until(lambda: run.core.foundation.writer.pending == 0)
        tasks.start_soon(run.run.checkpoint, "within")  # it counts as the second epoch's
        await anyio.wait_all_tasks_blocked()
        run.job.passes.release()
        await run.until(lambda: run.sample("tolaria.checkpoint.duration_seconds_count") == 4)
        run.job.passes.release(2)
        if held:
            await run.until(run.job.validating.is_set)
            run.core.lane.hold("test")
        run.job.passes.release(100)
        await run.until(lambda: run.status.rollbacks == 1)
        run.core.lane.release("test")
        await run.until(lambda: run.state in ENDED)
        assert await rollbacks_of(run) == [("full", 2 * STEPS + 6)]
    assert (run.state, run.module.global_step) == ("FINISHED", EPOCHS * STEPS)
    assert len(peers.states) == len({state.current_epoch for state in peers.states})
