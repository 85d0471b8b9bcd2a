"""The state that an operator's rollback leaves: it is saved first, so that the rollback can be undone."""

from __future__ import annotations

import time
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT, ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, ROLLBACK_TIER_UNSPECIFIED
from support.checkpointing import Disk
from support.runs import FakePeers, RunUnderTest, new_run, running, train_to
from tolaria.errors import CheckpointWriteError
from tolaria.filesystem import Filesystem
from tolaria.journal.rows import CheckpointRow
from tolaria.lane.messages import StepDone
from tolaria.rollback.protocol import Rollback
from tolaria.run.verdicts import RateCut, Retreat

pytestmark = pytest.mark.anyio

AUTO, FAST, FULL = ROLLBACK_TIER_UNSPECIFIED, ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL
RARE: dict[str, object] = {"every_epochs": 10**6, "keep_last": 100}
"""Checkpoints are on, and none is due in a test."""


class Losses:
    """The losses of a run by step; for a repeated step the last one."""

    def __init__(self, run: RunUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_step: dict[int, float] = {}
        on_judged = run.recovery.on_judged

        def recorded(step: StepDone) -> None:
            self.by_step[step.global_step] = step.loss
            on_judged(step)

        monkeypatch.setattr(run.recovery, "on_judged", recorded)


def stepped(
    job: str = "GatedJob",
    *,
    checkpoint: dict[str, object] | None = None,
    rollback: dict[str, object] | None = None,
    files: Filesystem | None = None,
    **training: Any,
) -> RunUnderTest:
    """Returns a run that makes a step for each pass that the test releases, with a snapshot of each step."""
    budgets: dict[str, object] = {"fast_budget_s": 20.0, "full_budget_s": 30.0, "automatic": False, "every_steps": 1}
    sections: dict[str, object] = {
        "rollback": {**budgets, **(rollback or {})},
        "checkpoint": {**RARE, **(checkpoint or {})},
    }
    options = {"dropout": 0.3, **training.pop("options", {})}
    return new_run(FakePeers(), job=job, sections=sections, epochs=10**6, files=files, options=options, **training)


async def stop(run: RunUnderTest) -> None:
    """Ends the run, which may be within a step."""
    run.job.passes.release(100)
    await run.run.stop("enough")


async def kept(run: RunUnderTest, step: int | None = None) -> dict[str, CheckpointRow]:
    """The kept checkpoints, of a step if one is given, by id."""
    rows = await run.journal.kept_points()
    return {row.checkpoint_id: row for row in rows if step is None or row.global_step == step}


def back_to(step: int, tier: Any = FAST, *, origin: str = "operator") -> Rollback:
    """Returns a rollback to the point at or before this step."""
    return Rollback(tier, step, "back", origin)


def undo(rollback: Rollback) -> Rollback:
    """Returns the rollback that undoes another one."""
    return Rollback(AUTO, None, "undo", "operator", checkpoint_id=rollback.left_checkpoint_id)


async def roll_back_within(run: RunUnderTest, rollback: Rollback) -> Rollback:
    """Rolls back while the job is within a microbatch, which it ends then."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.run.roll_back, rollback)
        await run.until(lambda: run.recovery.running)
        run.job.passes.release()
    return rollback


async def undisturbed(steps: int, monkeypatch: pytest.MonkeyPatch, **training: Any) -> dict[int, float]:
    """Returns the losses of a run that never goes back."""
    run = stepped(**training)
    losses = Losses(run, monkeypatch)
    async with running(run):
        await train_to(run, steps, passes_each=training.get("accumulate", 1))
        await stop(run)
    return {step: loss for step, loss in losses.by_step.items() if step <= steps}


async def test_a_rollback_is_undone_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a snapshot, on from there, back again: the same digest, and then the losses of an undisturbed run.

    The ring is full: a capture in it would evict the snapshot that is the target.
    """
    expected = await undisturbed(20, monkeypatch)
    run = stepped(rollback={"snapshots_max": 1, "every_steps": 4})
    losses = Losses(run, monkeypatch)
    async with running(run):
        await train_to(run, 11)
        (oldest,) = (info.position.global_step for info in run.status.snapshots)
        assert oldest < 10
        away = await run.run.roll_back(back_to(oldest))
        assert (away.restored_step, away.left_step, away.left_not_kept) == (oldest, 11, "")
        assert 86_000 < away.left_kept_until_ns / 1e9 - time.time() <= 86_400  # as checkpoint.keep_superseded_s is
        assert away.superseded_kept == 2
        row = (await kept(run))[away.left_checkpoint_id]
        assert (row.global_step, row.state) == (11, "superseded")
        await train_to(run, oldest + 2)
        returned = await run.run.roll_back(undo(away))
        assert returned.restored_step == 11
        assert returned.state_digest == returned.expected_digest == row.digest
        assert returned.left_step == oldest + 2
        assert (await kept(run))[returned.left_checkpoint_id].state == "superseded"  # and that can be undone as well
        await train_to(run, 20)
        await stop(run)
    assert {step: loss for step, loss in losses.by_step.items() if 11 < step <= 20} == {
        step: loss for step, loss in expected.items() if step > 11
    }


async def test_within_a_step_the_last_whole_step_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two microbatches the step that is given up is made again after the way back."""
    expected = await undisturbed(8, monkeypatch, accumulate=2)
    run = stepped(accumulate=2)
    losses = Losses(run, monkeypatch)
    async with running(run):
        await train_to(run, 5, passes_each=2)
        await run.run.resume("into the next step")
        await anyio.to_thread.run_sync(run.job.entered.acquire)
        away = await roll_back_within(run, back_to(2))
        assert (away.restored_step, away.left_step) == (2, 5)
        returned = await roll_back_within(run, undo(away))
        assert returned.restored_step == 5
        run.job.passes.release(20)
        await run.until(lambda: run.status.global_step >= 8)
        await stop(run)
    assert [losses.by_step[step] for step in (6, 7, 8)] == [expected[step] for step in (6, 7, 8)]


async def test_during_an_evaluation() -> None:
    """The evaluation is abandoned; after the way back it is made, and the epoch ends once."""
    options = {"collapses": [2], "gated": [2], "times": 1}
    run = stepped("CollapsingJob", options=options, rollback={"snapshots_max": 100})
    async with running(run):
        run.job.passes.release(3)
        await anyio.to_thread.run_sync(run.job.validating.wait)
        away = back_to(14)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.run.roll_back, away)
            await run.until(lambda: run.recovery.running)
            run.job.passes.release(100)
        assert (away.restored_step, away.left_step) == (14, 16)
        returned = await run.run.roll_back(undo(away))
        assert returned.restored_step == 16
        await run.until(lambda: run.status.last_epoch is not None and run.status.last_epoch.epoch == 2)
        assert run.status.last_epoch is not None
        assert run.status.last_epoch.global_step == 16
        await stop(run)


async def test_a_state_that_has_a_checkpoint_gets_no_second_one() -> None:
    """Whether an operator or a HALT has made it; the answer names it."""
    run = stepped()
    async with running(run):
        await train_to(run, 3)
        saved = await run.run.checkpoint("by hand")
        away = await run.run.roll_back(back_to(1))
        assert away.left_checkpoint_id == saved.checkpoint_id
        await train_to(run, 3)
        await run.safety.raise_emergency(EMERGENCY_LEVEL_HALT, "smoke", run.status)
        await run.until(lambda: run.checkpointing.saved_step == 3)
        (halted,) = set(await kept(run, 3)) - {saved.checkpoint_id}
        away = await run.run.roll_back(back_to(1))
        assert away.left_checkpoint_id == halted
        assert set(await kept(run, 3)) == {saved.checkpoint_id, halted}
        await stop(run)


async def test_a_rollback_that_is_repeated_does_not_displace_the_first_state() -> None:
    """Rollbacks from a state that no step has followed share one checkpoint of it."""
    run = stepped()
    async with running(run):
        await train_to(run, 1)
        await run.run.checkpoint("to resume from")
        await train_to(run, 4)
        away = await run.run.roll_back(back_to(2))
        second, third = await run.run.roll_back(back_to(2)), await run.run.roll_back(back_to(2))
        assert second.left_checkpoint_id == third.left_checkpoint_id
        await train_to(run, 3)
        await run.run.checkpoint("the next one prunes")
        assert {away.left_checkpoint_id, second.left_checkpoint_id} < set(await kept(run))
        returned = await run.run.roll_back(undo(away))
        assert returned.restored_step == 4
        await stop(run)


async def test_retention_spares_target_and_left_state() -> None:
    """With one checkpoint to keep and one superseded one, neither of them is removed by the capture."""
    run = stepped(checkpoint={"keep_last": 1, "keep_superseded": 1})
    async with running(run):
        await train_to(run, 2)
        target = await run.run.checkpoint("the target")
        await train_to(run, 4)
        away = await run.run.roll_back(back_to(3, FULL))
        assert away.state_digest == target.digest
        assert set(await kept(run)) == {target.checkpoint_id, away.left_checkpoint_id}
        await train_to(run, 3)
        returned = await run.run.roll_back(undo(away))  # a superseded target, with one more superseded from now on
        assert returned.restored_step == 4
        await run.run.checkpoint("the next one")
        assert returned.left_checkpoint_id in await kept(run)
        await stop(run)


async def test_the_left_state_is_no_target() -> None:
    """A rollback of the full tier to any step, or to the newest point, goes to a checkpoint from before it."""
    run = stepped()
    async with running(run):
        await train_to(run, 2)
        target = await run.run.checkpoint("the target")
        await train_to(run, 5)
        away = await run.run.roll_back(back_to(1000, FULL))
        assert (away.restored_step, away.state_digest) == (2, target.digest)
        await stop(run)


async def test_a_target_is_not_removed_to_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by its own rollback nor by another checkpoint that is tried on the full disk meanwhile."""
    disk = Disk()
    run = stepped(files=disk, checkpoint={"retry_s": 3600.0})
    loads, tried = run.core.foundation.storage.checkpoints.load_first, anyio.Event()

    def load_after_a_try(*arguments: Any) -> Any:
        with pytest.raises(CheckpointWriteError):
            anyio.from_thread.run(run.checkpointing.create, "meanwhile")
        anyio.from_thread.run_sync(tried.set)
        return loads(*arguments)

    async with running(run):
        await train_to(run, 3)
        first = await run.run.checkpoint("first")
        await run.run.roll_back(back_to(1))
        await run.until(lambda: run.checkpointing.saved_step == 1)
        await train_to(run, 2)
        monkeypatch.setattr(run.core.foundation.storage.checkpoints, "load_first", load_after_a_try)
        disk.full = True
        back = Rollback(AUTO, None, "back", "operator", checkpoint_id=first.checkpoint_id)
        assert (await run.run.roll_back(back)).state_digest == first.digest
        assert tried.is_set()
        disk.full = False
        await stop(run)


async def test_a_full_disk_does_not_stop_a_rollback() -> None:
    """The answer has the reason, the superseded target stays, and the run waits for the disk as it is set to."""
    disk = Disk()
    run = stepped(files=disk, checkpoint={"retry_s": 0.05})
    async with running(run):
        await train_to(run, 4)
        first = await run.run.checkpoint("first")
        await run.run.roll_back(back_to(1))
        await run.until(lambda: run.checkpointing.saved_step == 1)
        await train_to(run, 2)
        await run.run.resume("on")
        disk.full = True
        back = Rollback(AUTO, None, "back", "operator", checkpoint_id=first.checkpoint_id)
        await roll_back_within(run, back)
        assert (back.restored_step, back.state_digest) == (4, first.digest)
        assert back.left_checkpoint_id == ""
        assert "ENOSPC" in back.left_not_kept
        assert run.state == "PAUSED"
        assert "no checkpoint can be written" in run.status.state_reason
        disk.full = False
        await run.until(lambda: run.state == "RUNNING")
        await stop(run)


async def test_a_hanging_disk_delays_a_rollback_by_the_full_budget() -> None:
    """The time is reported apart; when the disk answers, the checkpoint is there, superseded, and can be gone to."""
    disk = Disk()
    run = stepped(files=disk, rollback={"full_budget_s": 0.3})
    async with running(run):
        await train_to(run, 3)
        disk.gate.clear()
        away = await run.run.roll_back(back_to(1))
        assert (away.restored_step, away.left_step, away.left_checkpoint_id) == (1, 3, "")
        assert "within 0.3 s" in away.left_not_kept
        assert away.kept_ms >= 300
        assert away.latency_ms == pytest.approx(away.waited_ms + away.kept_ms + away.restored_ms)
        disk.gate.set()
        await run.until(lambda: not run.core.foundation.writer.pending)
        (row,) = (await kept(run, 3)).values()
        assert row.state == "superseded"
        await stop(run)


async def test_a_disk_that_is_known_to_hang_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """While an earlier checkpoint is stalled, a rollback begins at once, far from the end of the full budget."""
    monkeypatch.setattr("tolaria.run.checkpointing.STALLED_S", 0.05)
    disk = Disk()
    run = stepped(files=disk, rollback={"full_budget_s": 3600.0})
    async with running(run):
        await train_to(run, 3)
        disk.gate.clear()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.run.checkpoint, "stalled")
            await run.until(lambda: bool(run.checkpointing.failing))
            with anyio.fail_after(180):
                away = await run.run.roll_back(back_to(1))
            disk.gate.set()
        assert (away.restored_step, away.left_checkpoint_id) == (1, "")
        assert "the checkpoint of step 3 takes longer" in away.left_not_kept
        await stop(run)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"every_epochs": 0}, "checkpoint.every_epochs and checkpoint.every_steps are 0"),
        ({"keep_superseded": 0}, "checkpoint.keep_superseded or"),
        ({"keep_superseded_s": 0}, "checkpoint.keep_superseded or"),
    ],
)
async def test_without_checkpoints_the_state_is_not_kept(settings: dict[str, object], reason: str) -> None:
    """The rollback is made, and the answer says that and why it cannot be undone."""
    run = stepped(checkpoint=settings)
    async with running(run):
        await train_to(run, 3)
        away = await run.run.roll_back(back_to(1))
        assert (away.restored_step, away.left_step, away.left_checkpoint_id) == (1, 3, "")
        assert reason in away.left_not_kept
        assert await kept(run) == {}
        await stop(run)


async def test_an_ill_state_and_automatic_rollbacks_keep_nothing() -> None:
    """A state that health has judged must never be a restore point."""
    run = stepped()
    async with running(run):
        await train_to(run, 1)
        first = await run.run.checkpoint("to resume from")
        await train_to(run, 4)
        await run.run.roll_back(back_to(3, origin="tamiyo"))
        await train_to(run, 6)
        run.recovery.retreat(Retreat("loss exploded", 6, (), RateCut(0.5, 3)))
        await run.until(lambda: not run.recovery.running)
        run.recovery.ill = "loss exploded"
        away = await run.run.roll_back(back_to(2))
        assert away.left_checkpoint_id == ""
        assert "the live state is ill" in away.left_not_kept
        assert set(await kept(run)) == {first.checkpoint_id}
        await stop(run)
