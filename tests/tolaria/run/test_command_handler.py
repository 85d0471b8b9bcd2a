from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    COMMAND_OPTIMIZER,
    COMMAND_SEED,
    ROLLBACK_TIER_FAST,
    SEED_STAGE_TRAINING,
)
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import command
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.config import SeedsSettings
from tolaria.errors import AdjustmentRefusedError, TolariaError, UnknownGroupError, WrongStateError
from tolaria.rollback.protocol import Rollback
from tolaria.run.adjustments import saved_adjustments
from tolaria.values.optimization import Adjustment

pytestmark = pytest.mark.anyio


def once(made: AdaptationCommand) -> FakePeers:
    """Returns peers of which Tamiyo sends this command after the first epoch."""

    async def answer(state: SystemStatePacket) -> AdaptationCommand | None:
        return made if state.current_epoch == 1 else None

    return FakePeers(answer)


def by_operator(**fields: object) -> Adjustment:
    """Returns an operator's adjustment."""
    return Adjustment(**{"group": None, **fields}, origin="operator", request_id="1", reason="calm")  # type: ignore[arg-type]


async def finished(peers: FakePeers, **options: Any) -> RunUnderTest:
    """Returns a finished run of three epochs with these peers."""
    async with running(new_run(peers, **options, epochs=3)) as run:
        await run.until(lambda: run.state == "FINISHED")
    return run


def optimizer_command(**hyperparameters: float) -> AdaptationCommand:
    """Returns a COMMAND_OPTIMIZER with these hyperparameters."""
    made = command(COMMAND_OPTIMIZER)
    made.optimizer_adjustment.hyperparameters.update(hyperparameters)
    return made


async def test_tamiyo_changes_rates_and_hyperparameters() -> None:
    """A factor and a momentum reach the optimizer, are shown, and are counted by origin."""
    run = await finished(once(optimizer_command(lr_factor=0.5, momentum=0.25)))
    group = run.module.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.025, 0.25)
    assert run.run.status().learning_rates == {"host": 0.025}
    value = run.metrics.registry.get_sample_value
    assert run.status.commands_accepted == 1
    assert value("tolaria.lr_controller.current_lr", {"group": "host"}) == 0.025
    assert value("tolaria.lr_controller.adjustments_total", {"origin": "tamiyo"}) == 1


@pytest.mark.parametrize(
    ("hyperparameters", "rate"), [({"lr_factor": 1e9}, 0.5), ({"lr_factor": 1e-9}, 0.0005), ({"lr": 1e-9}, 0.0005)]
)
async def test_tamiyo_is_limited_to_her_authority(hyperparameters: dict[str, float], rate: float) -> None:
    """What goes beyond 0.01 to 10 times the schedule is limited, and both the event and the status say so."""
    run = await finished(once(optimizer_command(**hyperparameters)))
    assert run.module.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    assert run.status.commands_accepted == 1
    assert run.events.count("tolaria.lr_limited") == 1


async def test_the_status_says_how_tamiyo_was_limited() -> None:
    """In her answer, until the next one."""
    run = new_run(once(optimizer_command(lr_factor=1e9)), epochs=1)
    async with running(run):
        await run.until(lambda: run.status.commands_accepted == 1)
    assert "limited to 10" in run.run.status().tamiyo_answer


@pytest.mark.parametrize("hyperparameters", [{"nonsense": 1.0}, {"momentum": 2.0}, {"lr_factor": 0.5, "nonsense": 1.0}])
async def test_what_the_lane_refuses_changes_nothing_and_is_counted(hyperparameters: dict[str, float]) -> None:
    """Out of bounds or unknown: counted as refused, evented, and every rate stays."""
    run = await finished(once(optimizer_command(**hyperparameters)))
    assert run.module.optimizer.param_groups[0]["lr"] == 0.05
    assert run.sample("tolaria.command.rejected_total", {"reason": "refused"}) == 1
    assert run.events.count("command_rejected") == 1
    assert run.status.commands_accepted == 0


async def test_operators_change_rates_while_it_runs_and_while_it_is_paused() -> None:
    """The answer has the step; the status shows the rate; a factor that expires is gone afterwards."""
    run = new_run(FakePeers(), epochs=10**6)
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        await run.run.pause("look")
        before = run.status.global_step
        adjustment = by_operator(factor=0.5, expires_after_steps=5)
        assert await run.run.adjust_learning_rate(adjustment) == before
        status = run.run.status()
        assert status.learning_rates == {"host": 0.025}
        (shown,) = status.adjustments
        assert (shown.origin, shown.request_id, shown.reason, shown.factor) == ("operator", "1", "calm", 0.5)
        assert shown.expires_at_step == shown.from_step + 5 == before + 5
        await run.run.resume("on")
        await run.until(lambda: run.status.global_step > before + 40)
        assert run.run.status().learning_rates == {"host": 0.05}
        await run.run.stop("enough")
        with pytest.raises(WrongStateError):
            await run.run.adjust_learning_rate(adjustment)


@pytest.mark.parametrize(
    ("adjustment", "error"),
    [
        ({"factor": 0.5, "group": "nothing"}, UnknownGroupError),
        ({"value": 1e9}, AdjustmentRefusedError),
        ({"factor": 1e12}, AdjustmentRefusedError),
    ],
)
async def test_an_impossible_adjustment_changes_nothing(
    adjustment: dict[str, object], error: type[TolariaError]
) -> None:
    """An unknown group or a rate out of bounds is refused by the lane, and the rate stays."""
    run = new_run(FakePeers(), epochs=10**6)
    async with running(run):
        await run.until(lambda: run.state == "RUNNING")
        with pytest.raises(error):
            await run.run.adjust_learning_rate(by_operator(**adjustment))
        assert run.run.status().learning_rates == {"host": 0.05}
        await run.run.stop("enough")


async def test_a_foreign_write_is_put_back_before_the_next_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that writes to the rate behind the controller's back is found out: counted, undone, and reported once."""
    run = new_run(FakePeers(), epochs=2)
    losses, group = run.job.losses, run.module.optimizer.param_groups[0]
    rates = []

    def meddling(model: object, batch: object) -> object:
        rates.append(group["lr"])
        if len(rates) >= 5:
            group["lr"] = 7.0
        return losses(model, batch)

    monkeypatch.setattr(run.job, "losses", meddling)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
        health = run.run.status().health
    assert set(rates) == {0.05}
    value = run.metrics.registry.get_sample_value
    assert value("tolaria.lr_controller.integrity_violations_total", {"group": "host"}) == 12
    (event,) = run.emitter.attributes_of("tolaria.lr_integrity_violation")
    assert "optimizer.policy" in event["detail"]
    assert "before 12 steps; Tolaria owns the learning rates" in health.summary


async def test_a_seed_that_kasmina_desires_grows_and_shows() -> None:
    """Desired at one boundary it trains from the next step on, with its group, its rate and its entry in the state."""
    seed = SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp")
    peers = FakePeers(seeds=[seed])
    async with running(new_run(peers, job="SlotJob", epochs=3)) as run:
        await run.until(lambda: run.state == "FINISHED")
    (seed_state,) = peers.states[-1].seed_states
    assert (seed_state.seed_id, seed_state.slot) == ("a", "middle")
    assert seed_state.gradient_norm > 0
    assert set(run.run.status().learning_rates) == {"host", "seed:a"}
    value = run.metrics.registry.get_sample_value
    assert value("tolaria.seeds.active", {"stage": "training"}) == 1
    assert value("tolaria.opt.rebuilds_total") == 1
    assert "tolaria.opt_rebuilt" in run.events


async def test_a_seed_command_that_kasmina_refuses_is_not_applied() -> None:
    """A refusal by Kasmina rejects the command with its detail."""
    peers = once(command(COMMAND_SEED))
    peers.accepts = False
    run = await finished(peers, job="SlotJob")
    assert run.status.commands_accepted == 0
    assert run.sample("tolaria.command.rejected_total", {"reason": "refused"}) == 1


async def test_an_adjustment_whose_caller_goes_away_is_made_once() -> None:
    """The caller is cancelled while the lane is busy; the adjustment is made, counted and shown once."""
    run = new_run(FakePeers(), job="GatedJob", epochs=10**6)
    async with running(run):
        with anyio.move_on_after(0.05):
            await run.run.adjust_learning_rate(by_operator(factor=0.5))
        run.job.passes.release(10**6)
        await run.until(lambda: run.run.status().learning_rates == {"host": 0.025})
        assert run.sample("tolaria.lr_controller.adjustments_total", {"origin": "operator"}) == 1
        await run.run.stop("enough")


async def test_a_seed_command_is_answered_by_what_the_lane_did() -> None:
    """Kasmina applies it, but the lane refuses the seed: the command is rejected with the lane's reason."""
    peers = once(command(COMMAND_SEED))
    peers.seeds = [SeedState(seed_id="seed-1", stage=SEED_STAGE_TRAINING, blueprint_id="nothing")]
    run = await finished(peers, job="SlotJob")
    assert (run.status.commands_accepted, run.status.commands_rejected) == (0, 1)
    (rejected,) = run.emitter.attributes_of("command_rejected")
    assert "blueprint 'nothing' is unknown" in rejected["detail"]
    assert run.status.seeds == []


@pytest.mark.parametrize(
    ("seeds", "job", "reason"),
    [
        ({}, "TinyJob", "no_slot"),
        ({"enabled": False}, "SlotJob", "seeds_disabled"),
        ({"active_max": 0}, "SlotJob", "no_slot"),
        ({"fossilized_max": 0}, "SlotJob", "seeds_fossilized_max"),
    ],
)
async def test_growth_beyond_the_settings_is_refused(seeds: dict[str, object], job: str, reason: str) -> None:
    """The command is refused with the reason before Kasmina receives it, and no seed is shown."""
    peers = once(command(COMMAND_SEED))
    run = await finished(peers, job=job, sections={"seeds": SeedsSettings(**seeds)})  # type: ignore[arg-type]
    assert run.sample("tolaria.command.rejected_total", {"reason": reason}) == 1
    assert peers.applied == []
    assert (run.status.commands_accepted, run.status.seeds) == (0, [])
    free = peers.states[-1].training_metrics["seeds.slots_free"]
    assert free == (1 if reason == "seeds_fossilized_max" else 0)


async def test_kasmina_is_not_asked_when_seeds_are_disabled() -> None:
    """What she desires has no effect."""
    peers = FakePeers(seeds=[SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp")])
    run = await finished(peers, job="SlotJob", sections={"seeds": SeedsSettings(enabled=False)})
    assert (run.status.seeds, run.status.refusals) == ([], ())
    assert run.status.kasmina_answer == "not asked (seeds.enabled is off)"


async def test_an_operators_adjustment_survives_a_rollback() -> None:
    """It is in force at the restored step and shown, and the digest proves the state without it."""
    run = new_run(FakePeers(), epochs=10**6, sections={"rollback": {"automatic": False, "every_steps": 1}})
    async with running(run):
        await run.until(lambda: run.status.global_step > 20)
        await run.run.adjust_learning_rate(by_operator(factor=0.1))
        temporary = replace(by_operator(factor=0.5, expires_after_steps=10**6), request_id="2")
        made_at = await run.run.adjust_learning_rate(temporary)
        await run.until(lambda: run.status.global_step > made_at + 20)
        await run.run.pause("look")
        left_at = run.status.global_step
        target = min(point.position.global_step for point in run.status.snapshots)
        done = await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, target, "odd", "operator"))
        assert done.state_digest == done.expected_digest
        assert done.restored_step == target
        status = run.run.status()
        assert [each.request_id for each in status.adjustments] == ["1", "2"]
        assert status.learning_rates == pytest.approx({"host": 0.0025})
        if target < made_at:
            assert status.adjustments[1].expires_at_step == target + 10**6 - (left_at - made_at)
        saved = await anyio.to_thread.run_sync(saved_adjustments, run.storage.journal, "run")
        assert [each.adjustment.request_id for each in saved] == ["1", "2"]
        await run.run.stop("enough")


async def test_an_adjustment_is_made_once_for_a_request_that_is_in_force() -> None:
    """A repeat after a crash that lost its answer changes nothing and succeeds."""
    run = new_run(FakePeers(), epochs=10**6)
    async with running(run):
        await run.until(lambda: run.state == "RUNNING")
        for _ in range(2):
            await run.run.adjust_learning_rate(by_operator(factor=0.1))
        assert run.run.status().learning_rates == pytest.approx({"host": 0.005})
        await run.run.stop("enough")
