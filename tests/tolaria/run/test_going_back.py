"""Timelines of runs that go back, and back again: what an operator does, and what is there afterwards."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT, ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, ROLLBACK_TIER_UNSPECIFIED
from support.runs import FakePeers, RunUnderTest, new_run, running, train_to
from tolaria.errors import NoCheckpointError, WrongStateError
from tolaria.journal.rows import CheckpointRow, RollbackRow
from tolaria.rollback.protocol import Rollback
from tolaria.run.verdicts import RateCut, Retreat

pytestmark = pytest.mark.anyio

BUDGETS: dict[str, object] = {"fast_budget_s": 20.0, "full_budget_s": 30.0, "automatic": False}
AUTO, FAST, FULL = ROLLBACK_TIER_UNSPECIFIED, ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL


def stepped(
    job: str = "GatedJob", *, every_steps: int = 0, checkpoint: dict[str, object] | None = None, **training: Any
) -> RunUnderTest:
    """Returns a run that makes a step for each pass that the test releases, with one checkpoint for each epoch."""
    sections: dict[str, object] = {
        "rollback": {**BUDGETS, "every_steps": every_steps or 10**6},
        "checkpoint": checkpoint or {"every_epochs": 1, "keep_last": 100},
    }
    return new_run(FakePeers(), job=job, sections=sections, epochs=10**6, **training)


async def saved(run: RunUnderTest) -> CheckpointRow:
    """Makes a checkpoint of the present state."""
    return await run.run.checkpoint("test")


async def kept(run: RunUnderTest) -> dict[str, str]:
    """The kept checkpoints and their states, by id."""
    return {row.checkpoint_id: row.state for row in await run.journal.kept_points()}


async def stop(run: RunUnderTest) -> None:
    """Ends the run, which may be within a step."""
    run.job.passes.release(100)
    await run.run.stop("enough")


def to(row: CheckpointRow) -> Rollback:
    """An operator's rollback to exactly this checkpoint."""
    return Rollback(AUTO, None, "to this one", "operator", checkpoint_id=row.checkpoint_id)


async def test_a_rollback_to_an_early_point_and_on_and_undone() -> None:
    """Two branches have checkpoints of the same step; each can be returned to, bit by bit, with its own lineage."""
    run = stepped(checkpoint={"every_epochs": 10**6, "keep_last": 100, "keep_superseded": 5})
    async with running(run):
        await train_to(run, 3)
        early = await saved(run)
        await train_to(run, 6)
        first = await saved(run)
        back = await run.run.roll_back(Rollback(FULL, 4, "too far", "operator"))
        assert (back.restored_step, back.attempt, back.superseded) == (3, 2, 1)
        assert await kept(run) == {early.checkpoint_id: "committed", first.checkpoint_id: "superseded"}
        await train_to(run, 6)
        second = await saved(run)
        assert (second.parent, second.attempt) == (early.checkpoint_id, 2)
        await train_to(run, 8)
        undone = await run.run.roll_back(to(first))
        assert (undone.restored_step, undone.attempt) == (6, 3)
        assert undone.state_digest == undone.expected_digest == first.digest
        states = {early.checkpoint_id: "committed", first.checkpoint_id: "committed"}
        left = {undone.left_checkpoint_id: "superseded"}
        assert await kept(run) == {**states, **left, second.checkpoint_id: "superseded"}
        nearest = await run.run.roll_back(Rollback(FULL, 7, "nearest", "operator"))
        assert nearest.state_digest == first.digest  # of the two at step 6, the ancestor
        again = await run.run.roll_back(to(second))
        assert again.state_digest == second.digest
        states = {early.checkpoint_id: "committed", first.checkpoint_id: "superseded"}
        assert await kept(run) == {**states, **left, second.checkpoint_id: "committed"}
        with pytest.raises(NoCheckpointError, match="there is no checkpoint unknown"):
            await run.run.roll_back(Rollback(AUTO, None, "x", "operator", checkpoint_id="unknown"))
        await stop(run)
        rows = await anyio.to_thread.run_sync(lambda: run.storage.journal.rows(RollbackRow, run_id="run"))
    assert [(row.origin, row.attempt) for row in rows if row.outcome == "restored"] == [
        ("operator", attempt) for attempt in (2, 3, 4, 5)
    ]


async def test_snapshots_of_another_branch_are_not_restored() -> None:
    """After going to a superseded checkpoint, a snapshot of the branch that was left is no restore point."""
    run = stepped(every_steps=1, checkpoint={"every_epochs": 10**6, "keep_superseded": 5})
    async with running(run):
        await train_to(run, 3)
        first = await saved(run)
        await run.run.roll_back(Rollback(FAST, 1, "back", "operator"))
        await train_to(run, 5)
        await run.run.roll_back(to(first))
        assert [info.position.global_step for info in run.status.snapshots] == []
        with pytest.raises(NoCheckpointError):
            await run.run.roll_back(Rollback(FAST, 100, "x", "operator"))
        await stop(run)


async def test_superseded_checkpoints_are_few() -> None:
    """Retention keeps the newest of them and removes the others when the next checkpoint is written."""
    run = stepped(checkpoint={"every_epochs": 10**6, "keep_last": 100, "keep_superseded": 2})
    async with running(run):
        rows = []
        for step in (1, 2, 3, 4):
            await train_to(run, step)
            rows.append(await saved(run))
        await run.run.roll_back(to(rows[0]))
        await train_to(run, 2)
        newest = await saved(run)
        found = await kept(run)
        await stop(run)
    ids = [row.checkpoint_id for row in rows]
    assert found == {ids[0]: "committed", ids[2]: "superseded", ids[3]: "superseded", newest.checkpoint_id: "committed"}


async def test_epochs_of_one_update_keep_a_proven_checkpoint() -> None:
    """With keep_last 3 the newest proven one is a fourth, and a retreat finds it."""
    run = stepped("TinyJob", checkpoint={"every_epochs": 1, "keep_last": 3}, accumulate=8)
    async with running(run):
        await run.until(lambda: run.status.global_step > 12)
        await run.run.pause("look")
        await run.until(lambda: not run.core.foundation.writer.pending)
        proven: list[int] = []
        with anyio.fail_after(180):
            while not proven:  # written behind the checkpoints
                rows = await run.journal.kept_points()
                proven = [row.global_step for row in rows if row.proven]
        assert len(rows) <= 5
        run.recovery.retreat(Retreat("odd", run.status.global_step + 1, (), RateCut(0.5, 3), durable=True))
        await run.until(lambda: not run.recovery.running)
        assert run.status.rollbacks_by_origin == {"health": 1}
        assert run.status.global_step >= max(proven)  # the journal may not know the newest one yet
        await run.run.stop("enough")


async def test_a_rollback_during_an_evaluation() -> None:
    """The evaluation is abandoned at its next batch; the epoch goes on from the restored step, and ends once."""
    options = {"collapses": [2], "gated": [2], "times": 1}
    run = stepped("CollapsingJob", every_steps=1, options=options)
    async with running(run):
        run.job.passes.release(3)
        await anyio.to_thread.run_sync(run.job.validating.wait)
        back = Rollback(FAST, 14, "during the evaluation", "operator")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.run.roll_back, back)
            await run.until(lambda: run.recovery.running)
            run.job.passes.release(100)
        assert 12 < back.restored_step <= 14  # the ring need not have kept the snapshot of every step
        await run.until(lambda: run.status.last_epoch is not None and run.status.last_epoch.epoch == 2)
        assert run.status.last_epoch is not None
        assert run.status.last_epoch.global_step == 16
        await stop(run)


async def test_waiting_for_a_long_step_is_reported_apart() -> None:
    """A step takes longer than the whole budget: the rollback waits for it, then restores within the budget."""
    rollback = {**BUDGETS, "every_steps": 1, "fast_budget_s": 30.0}
    run = new_run(FakePeers(), job="GatedJob", sections={"rollback": rollback}, epochs=10**6)
    async with running(run):
        for _ in range(2):
            await anyio.to_thread.run_sync(run.job.entered.acquire)
            run.job.passes.release()
        await anyio.to_thread.run_sync(run.job.entered.acquire)  # within the third step
        await run.until(lambda: run.status.global_step == 2)
        back = Rollback(FAST, 1, "back", "operator")
        back.began_s -= 60.0  # twice the budget ago
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.run.roll_back, back)
            await run.until(lambda: run.recovery.running)
            run.job.passes.release()
        assert (back.restored_step, run.state) == (1, "RUNNING")
        assert back.waited_ms > 60_000 > back.restored_ms
        assert run.sample("tolaria.rollback.deadline_exceeded_total") == 0
        await stop(run)


# -- halts -----------------------------------------------------------------------------------------------------------


async def test_an_ill_state_is_neither_saved_nor_resumed() -> None:
    """A halt for illness: no checkpoint of it, not even at a drain; a resume goes back first, and says so."""
    run = stepped(every_steps=1, checkpoint={"every_epochs": 10**6, "every_steps": 10**6})
    async with running(run):
        await train_to(run, 2)
        sound = await saved(run)
        await train_to(run, 7)
        run.recovery.retreat(Retreat("loss exploded", 0, (), RateCut(0.5, 3)))  # nothing is from before it
        await run.until(lambda: run.state == "HALTED")
        await run.until(lambda: not run.recovery.running)
        with pytest.raises(WrongStateError, match="the live state is ill"):
            await run.run.checkpoint("test")
        with pytest.raises(WrongStateError, match="clear it first"):
            await run.run.resume("now")
        run.safety.clear_emergency("looked at")
        await run.run.resume("go on")
        assert "because the halted state is ill" in run.status.state_reason
        assert run.status.rollbacks_by_origin == {"emergency": 1}
        assert run.status.global_step < 7
        run.recovery.ill = "made ill by the test"
        await run.run.drain(5.0)
        assert list(await kept(run)) == [sound.checkpoint_id]


async def test_a_halt_saves_a_sound_state() -> None:
    """An operator's HALT writes a checkpoint of the frozen state, once."""
    run = stepped()
    async with running(run):
        await train_to(run, 3)
        await run.safety.raise_emergency(EMERGENCY_LEVEL_HALT, "smoke", run.status)
        await run.until(lambda: run.checkpointing.saved_step == run.status.global_step)
        run.safety.clear_emergency("no fire")
        step = run.status.global_step
        await run.run.resume("go on")
        assert run.status.global_step == step
        assert len(await kept(run)) == 1
        await stop(run)
