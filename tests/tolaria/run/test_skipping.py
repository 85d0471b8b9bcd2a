"""Runs whose data or controller are ill, and that nevertheless train on, or halt with the reason."""

from __future__ import annotations

import anyio
import pytest
import torch

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import CIRCUIT_STATE_OPEN, COMMAND_ROLLBACK, ROLLBACK_TIER_FULL
from leyline.v1.state_pb2 import SystemStatePacket
from support.guard_runs import ENDED, hosted, run_to_end
from support.peers import command
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.rollback.protocol import Rollback
from tolaria.run.verdicts import RateCut, Retreat

pytestmark = pytest.mark.anyio


def poisoned(*places: tuple[int, int], epochs: int = 6, **sections: dict[str, object]) -> RunUnderTest:
    """Returns a run of eight batches an epoch whose losses at these (epoch, place) are NaN."""
    options = {"corrupted": [list(place) for place in places], "factor": float("nan")}
    return new_run(FakePeers(), job="CorruptedDataJob", sections=dict(sections), epochs=epochs, options=options)


def consecutive(first: int, count: int) -> list[tuple[int, int]]:
    """Returns `count` batches from the one of number `first`, counted over all epochs from 0."""
    return [(1 + number // 8, number % 8) for number in range(first, first + count)]


async def finished(run: RunUnderTest) -> RunUnderTest:
    """Runs to the end."""
    async with running(run):
        await run.until(lambda: run.state in ENDED)
        if run.state == "HALTED":
            await run.run.stop("enough")
    return run


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (20, 1), (5, 30)])
async def test_bad_batches_are_skipped_and_nothing_else_happens(first: int, count: int, automatic: bool) -> None:
    """The first one, one in the middle, thirty in a row: no rollback, no failed epoch, no pause."""
    run = await finished(poisoned(*consecutive(first, count), rollback={"automatic": automatic}))
    assert (run.state, run.status.rollbacks, run.status.skipped_steps) == ("FINISHED", 0, count)
    assert run.module.global_step == 6 * 8 - count
    assert run.events.count("tolaria.step_skipped") == count
    assert run.sample("tolaria.epochs.failed") == 0
    assert not run.safeguards.mode.on
    checks = run.emitter.attributes_of("tolaria.parameters_checked")
    assert [check["finite"] for check in checks] == ["True"] * (count // 8)


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize(("skip_extreme", "skipped"), [(True, 2), (False, 1)])
async def test_finite_losses_can_be_trusted(skip_extreme: bool, skipped: int, automatic: bool) -> None:
    """A batch whose loss is rare but real is trained with health.skip_extreme off, whether rollbacks are on or not.

    A loss that is not finite is skipped in any case.
    """
    options = {"corrupted": [[4, 5]], "factor": 100.0, "poison_from": 41}
    sections: dict[str, object] = {"health": {"skip_extreme": skip_extreme}, "rollback": {"automatic": automatic}}
    run = await finished(
        new_run(FakePeers(), job="CorruptedDataJob", sections=sections, epochs=6, options=options, clip_norm=1.0)
    )
    assert (run.state, run.status.rollbacks, run.status.skipped_steps) == ("FINISHED", 0, skipped)
    assert run.module.global_step == 6 * 8 - skipped


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("count", [2, 6, 7])
async def test_a_corrupted_shard_is_skipped_while_the_parameters_are_sound(count: int, automatic: bool) -> None:
    """Batches in a row whose losses are extreme change the model as little as ones that are not finite."""
    weights = []
    for factor in (1e4, float("nan")):
        options = {"corrupted": [list(place) for place in consecutive(26, count)], "factor": factor}
        sections: dict[str, object] = {"rollback": {"automatic": automatic}}
        run = await finished(new_run(FakePeers(), job="CorruptedDataJob", sections=sections, epochs=6, options=options))
        assert (run.state, run.status.rollbacks, run.status.skipped_steps) == ("FINISHED", 0, count)
        weights.append(list(run.module.model.parameters()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*weights, strict=True))


async def test_a_longer_shard_is_undone_and_left_out() -> None:
    """After `health.skips_max` - 1 skipped steps one is trained with; without a rollback it would ruin the run."""
    shard = consecutive(34, 10)
    options = {"corrupted": [list(place) for place in shard], "factor": 1e4}
    sections: dict[str, object] = {"rollback": {"every_steps": 2, "fast_budget_s": 10.0}}
    run = await finished(new_run(FakePeers(), job="CorruptedDataJob", sections=sections, epochs=8, options=options))
    assert (run.state, run.status.rollbacks) == ("FINISHED", 1)
    assert run.module.skipped.added >= set(shard[:8])
    assert run.status.last_epoch is not None
    assert run.status.last_epoch.evaluation.loss < 10.0


@pytest.mark.parametrize("automatic", [True, False])
async def test_a_sample_that_is_nan_costs_one_step_of_each_epoch(automatic: bool) -> None:
    """Wherever the order of the epoch puts it; nothing is rolled back."""
    sections = {"rollback": {"automatic": automatic}}
    run = hosted("support.user_jobs:Digits", 20, {"nan_sample": 100}, sections=sections)
    await run_to_end(run)
    assert (run.state, run.status.rollbacks) == ("FINISHED", 0)
    assert run.sample("tolaria.training.skipped_steps_total", {"reason": "loss_not_finite"}) == 20
    assert run.module.global_step == 20 * 40


async def test_a_state_that_memory_does_not_hold_goes_back_to_the_newest_proven_checkpoint() -> None:
    """A batch that is NaN is skipped, and no checkpoint is lost; a retreat takes the newest proven one of all."""
    sections: dict[str, object] = {
        "rollback": {"memory_mb": 8, "full_budget_s": 60.0},
        "checkpoint": {"every_epochs": 1, "keep_last": 3},
    }
    options = {"rows": 2600, "samples": 64, "nan_calls": [46]}
    run = new_run(FakePeers(), job="support.user_jobs:Table", epochs=10**6, sections=sections, options=options)
    async with running(run):
        with anyio.fail_after(120):
            await run.status.feed.until(lambda: run.status.skipped_steps == 1 and run.status.epoch > 9)
            await run.run.pause("look")
        kept = await run.journal.kept_points()
        assert (run.status.rollbacks, {row.state for row in kept}) == (0, {"committed"})
        newest = max(row.global_step for row in kept if row.proven)
        run.recovery.retreat(Retreat("made by the test", run.status.global_step + 1, (), RateCut(0.5, 3)))
        with anyio.fail_after(120):
            await run.status.feed.until(lambda: run.status.rollbacks == 1)
        # The last checkpoint may have been committed, or proven, after the list was read.
        proven = {row.global_step for row in await run.journal.kept_points() if row.proven}
        assert run.status.global_step in proven | {newest}
        assert run.status.global_step >= newest > 0
        await run.run.stop("enough")


async def test_a_job_whose_losses_are_nan_by_itself_is_not_rolled_back() -> None:
    """Also those of the last good batch, although all parameters and outputs are finite: going back would not help."""
    run = await finished(new_run(FakePeers(), epochs=6, options={"poison_from": 5, "poison_steps": 30}))
    assert (run.state, run.status.rollbacks) == ("FINISHED", 0)
    assert run.status.skipped_steps in range(24, 31)  # checks have used up some


@pytest.mark.parametrize(("first", "ill"), [(20, "are: the data are ill"), (0, "are: no step of the run was finite")])
async def test_too_much_bad_data_halts_with_the_reason(first: int, ill: str) -> None:
    """The parameters are sound, so nothing is rolled back; a person has to look at the data, or at the loss."""
    run = poisoned(*consecutive(first, 40), epochs=10, health={"skips_max": 4, "skips_data_max": 12})
    async with running(run):
        await run.until(lambda: run.state in ENDED)
        assert "skipped_data_spent: 12 steps in a row" in run.status.state_reason
        assert ill in run.status.state_reason
        assert run.status.rollbacks == 0
        await run.run.stop("enough")


async def test_a_controller_beyond_the_budget_of_rollbacks_is_refused() -> None:
    """She asks for one at each boundary: some are granted, then her breaker opens, and training goes on."""

    async def back(_state: SystemStatePacket) -> AdaptationCommand | None:
        return command(COMMAND_ROLLBACK)

    run = new_run(
        FakePeers(back),
        epochs=8,
        sections={"rollback": {"automatic_max": 2, "every_steps": 3, "fast_budget_s": 10.0}},
    )
    async with running(run):
        await run.until(lambda: run.state in ENDED)
        status = run.run.status()
    assert (run.state, run.status.rollbacks) == ("FINISHED", 2)
    assert run.sample("tolaria.command.rejected_total", {"reason": "rollback_budget"}) == 1
    assert status.breakers["tamiyo"] == CIRCUIT_STATE_OPEN
    assert run.sample("tolaria.epochs.failed") == 0


async def test_an_operators_rollback_to_an_early_point_is_no_explosion() -> None:
    """The losses are higher there; they are judged by the window of that point."""
    run = new_run(
        FakePeers(),
        epochs=10**6,
        sections={"rollback": {"every_steps": 3, "fast_budget_s": 10.0}, "health": {"window": 16}},
    )
    async with running(run):
        await run.until(lambda: run.status.global_step >= 6)
        await run.run.checkpoint("early")
        (row,) = await run.journal.kept_points()
        await run.until(lambda: run.status.global_step > 400)
        back = await run.run.roll_back(Rollback(ROLLBACK_TIER_FULL, row.global_step, "again", "operator"))
        assert back.restored_step == row.global_step
        await run.until(lambda: run.status.global_step > row.global_step + 300)
        assert (run.status.rollbacks, run.health.best_step >= row.global_step + 300) == (1, True)
        await run.run.stop("enough")


async def test_a_run_without_one_finite_step_fails() -> None:
    """It has learned nothing, and must not end as a success."""
    run = await finished(poisoned(*consecutive(0, 16), epochs=2))
    assert (run.state, run.status.global_step, run.status.rollbacks) == ("FAILED", 0, 0)
    assert "no step of the run was finite" in run.status.state_reason
