"""Runs whose validation accuracy collapses, and which go back by themselves."""

from __future__ import annotations

import anyio
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT
from leyline.v1.state_pb2 import SystemStatePacket
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.journal.rows import RollbackRow

pytestmark = pytest.mark.anyio

EPOCHS, STEPS = 5, 8


class Keepers(FakePeers):
    """Peers that have a checkpoint written at every boundary, which waits for it: exactly of the validated state."""

    run: RunUnderTest | None = None

    def __init__(self) -> None:
        super().__init__(self._keep)

    async def _keep(self, _state: SystemStatePacket) -> None:
        if self.run is not None:
            await self.run.loop.checkpoint("a good epoch")


def collapsing_run(
    *epochs: int, times: int = 1, gated: tuple[int, ...] = (), kept: bool = True
) -> tuple[RunUnderTest, Keepers]:
    """A run whose accuracy is lost in these epochs, so many times each; `kept`: with a checkpoint at each boundary."""
    rollback = {"automatic": True, "full_budget_s": 20.0, "automatic_max": 2}
    peers = Keepers()
    run = new_run(
        peers,
        job="CollapsingJob",
        sections={"rollback": rollback, "checkpoint": {"every_epochs": 0}},
        epochs=EPOCHS,
        deterministic=True,
        options={"collapses": list(epochs), "times": times, "gated": list(gated)},
    )
    peers.run = run if kept else None
    return run, peers


async def rolled_back_to(run: RunUnderTest) -> list[tuple[str, int]]:
    """Tier and step of each rollback on record."""
    rows = await anyio.to_thread.run_sync(run.parts.ground.storage.journal.rows, RollbackRow)
    return [(row.tier, row.restored_step) for row in rows]


async def ended(run: RunUnderTest) -> None:
    """Let it come to its end."""
    async with running(run):
        await run.until(lambda: run.state in {"FINISHED", "FAILED", "HALTED"})


@pytest.mark.parametrize("epoch", [2, 3, EPOCHS])
async def test_a_collapse_is_undone_from_disk_and_the_run_comes_to_a_good_end(epoch: int) -> None:
    """Also in the last epoch: one full rollback, every epoch counted, and no bad one shown to the controller."""
    run, peers = collapsing_run(epoch)
    async with running(run):
        await run.until(lambda: run.state in {"FINISHED", "FAILED", "HALTED"})
        assert await rolled_back_to(run) == [("full", (epoch - 1) * STEPS)]
    assert run.state == "FINISHED"
    assert run.rig.global_step == EPOCHS * STEPS
    assert (run.loop.rollbacks.completed, run.job.collapsed) == (1, 1)
    told = [(state.current_epoch, state.global_step) for state in peers.states]  # while conservative it hears nothing
    assert told[: epoch - 1] == [(n, n * STEPS) for n in range(1, epoch)]
    assert told == sorted(set(told))
    assert all(state.validation_accuracy > 0.5 for state in peers.states)
    assert run.progress.last_epoch is not None
    assert run.progress.last_epoch.epoch == EPOCHS


async def test_a_checkpoint_of_the_collapsed_epoch_is_not_gone_back_to() -> None:
    """One written within it is of the state that has gone wrong, and is not resumed from afterwards either."""
    run, _ = collapsing_run(3, gated=(3,))
    async with running(run), anyio.create_task_group() as tasks:
        await anyio.to_thread.run_sync(run.job.entered.acquire)
        while run.rig.global_step < 2 * STEPS + 5:
            await anyio.to_thread.run_sync(run.job.entered.acquire)
        tasks.start_soon(run.loop.checkpoint, "within")
        await anyio.wait_all_tasks_blocked()
        run.job.passes.release()
        while len(await run.parts.archive.restore_points()) < 3:
            await anyio.sleep(0.002)
        for _ in range(100):
            run.job.passes.release()
        await run.until(lambda: run.state in {"FINISHED", "FAILED", "HALTED"})
        assert await rolled_back_to(run) == [("full", 2 * STEPS)]
    assert (run.state, run.rig.global_step) == ("FINISHED", EPOCHS * STEPS)


async def test_a_collapse_that_does_not_mend_halts() -> None:
    """The budget of automatic rollbacks is spent; the run stands, and its boundary was never crossed."""
    run, peers = collapsing_run(3, times=10)
    await ended(run)
    assert run.state == "HALTED"
    assert run.guardian.controller.state.level == EMERGENCY_LEVEL_HALT
    assert [state.current_epoch for state in peers.states] == [1, 2]
    assert run.loop.rollbacks.completed == 2


async def test_without_any_checkpoint_a_collapse_is_told_and_training_goes_on() -> None:
    """There is nowhere to go back to: the failure is told, and the run comes to its end."""
    run, _ = collapsing_run(3, kept=False)
    await ended(run)
    assert (run.state, run.loop.rollbacks.completed) == ("FINISHED", 0)
    assert "tolaria.rollback.restore_failed" in run.events


@pytest.mark.parametrize("paused", [False, True])
async def test_going_back_into_the_midst_of_the_collapsed_epoch_runs_its_rest_and_no_more(paused: bool) -> None:
    """A checkpoint is of some steps after the epoch that asked for it: every epoch has its steps and its boundary.

    Also for a lane that has been made to stand before it has left the epoch.
    """
    run, peers = collapsing_run(3, gated=(3,))
    async with running(run), anyio.create_task_group() as tasks:
        await run.until(lambda: run.rig.global_step == 2 * STEPS + 5)
        run.loop.checkpoints._evaluation_wanted = True  # as if the last epoch's were so late
        tasks.start_soon(run.loop.checkpoint, "within")
        await anyio.wait_all_tasks_blocked()
        run.job.passes.release()
        while len(await run.parts.archive.restore_points()) < 3:
            await anyio.sleep(0.002)
        run.job.passes.release(2)
        if paused:
            await run.until(run.job.validating.is_set)
            run.loop._link.standstill.want("test")
        run.job.passes.release(100)
        await run.until(lambda: run.loop.rollbacks.completed == 1)
        run.loop._link.standstill.let_go("test")
        await run.until(lambda: run.state in {"FINISHED", "FAILED", "HALTED"})
        assert await rolled_back_to(run) == [("full", 2 * STEPS + 6)]
    assert (run.state, run.rig.global_step) == ("FINISHED", EPOCHS * STEPS)
    assert len(peers.states) == len({state.current_epoch for state in peers.states})
