from __future__ import annotations

import anyio
import pytest

from leyline.v1.admin_service_pb2 import AdjustLearningRateRequest
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    COMMAND_OPTIMIZER,
    COMMAND_SEED,
    SEED_STAGE_TRAINING,
)
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import command
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.errors import InvalidFieldError, WrongStateError

pytestmark = pytest.mark.anyio


def once(made: AdaptationCommand) -> FakePeers:
    """Peers of whom Tamiyo sends this after the first epoch, and nothing more."""

    async def answer(state: SystemStatePacket) -> AdaptationCommand | None:
        return made if state.current_epoch == 1 else None

    return FakePeers(answer)


async def finished(peers: FakePeers) -> RunUnderTest:
    """A run of three epochs with these peers, at its end."""
    async with running(new_run(peers, epochs=3)) as run:
        await run.until(lambda: run.state == "FINISHED")
    return run


def optimizer_command(**hyperparameters: float) -> AdaptationCommand:
    """COMMAND_OPTIMIZER with these hyperparameters."""
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
    "hyperparameters", [{"lr_factor": 1e9}, {"nonsense": 1.0}, {"momentum": 2.0}, {"lr_factor": 0.5, "nonsense": 1.0}]
)
async def test_what_the_lane_refuses_changes_nothing_and_is_told(hyperparameters: dict[str, float]) -> None:
    """Out of bounds or unknown: counted as refused, evented, and every rate stays."""
    run = await finished(once(optimizer_command(**hyperparameters)))
    assert run.module.optimizer.param_groups[0]["lr"] == 0.05
    assert run.sample("tolaria.command.rejected_total", {"reason": "refused"}) == 1
    assert run.events.count("command_rejected") == 1
    assert run.status.commands_accepted == 0


async def test_operators_change_rates_while_it_runs_and_while_it_is_paused() -> None:
    """The answer tells the step; the status shows the rate; a factor that expires is gone afterwards."""
    run = new_run(FakePeers(), epochs=10**6)
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        await run.run.pause("look")
        before = run.status.global_step
        request = AdjustLearningRateRequest(request_id="1", reason="calm", factor=0.5, expires_after_steps=5)
        assert await run.run.adjust_learning_rate(request) == before
        status = run.run.status()
        assert status.learning_rates == {"host": 0.025}
        (told,) = status.adjustments
        assert (told.origin, told.request_id, told.reason, told.factor) == ("operator", "1", "calm", 0.5)
        assert told.expires_at_step == told.from_step + 5 == before + 5
        run.run.resume("on")
        await run.until(lambda: run.status.global_step > before + 40)
        assert run.run.status().learning_rates == {"host": 0.05}
        await run.run.stop("enough")
        with pytest.raises(WrongStateError):
            await run.run.adjust_learning_rate(request)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"factor": 0.5, "group": "nobody"}, "group"),
        ({"value": 1e9}, "value"),
        ({"factor": 1e12}, "factor"),
        ({}, "factor"),
    ],
)
async def test_operators_mistakes_name_the_field(fields: dict[str, object], field: str) -> None:
    """An unknown group, a rate out of bounds, nothing at all: the field is named and the rate stays."""
    run = new_run(FakePeers(), epochs=10**6)
    async with running(run):
        await run.until(lambda: run.state == "RUNNING")
        with pytest.raises(InvalidFieldError) as caught:
            await run.run.adjust_learning_rate(AdjustLearningRateRequest(request_id="1", reason="x", **fields))  # type: ignore[arg-type]
        assert caught.value.field == field
        assert run.run.status().learning_rates == {"host": 0.05}
        await run.run.stop("enough")


async def test_a_foreign_write_is_put_back_before_the_next_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that writes to the rate behind the controller's back is found out: counted, evented, undone."""
    run = new_run(FakePeers(), epochs=2)
    losses, group = run.job.losses, run.module.optimizer.param_groups[0]
    rates = []

    def meddling(model: object, batch: object) -> object:
        rates.append(group["lr"])
        if len(rates) == 5:
            group["lr"] = 7.0
        return losses(model, batch)

    monkeypatch.setattr(run.job, "losses", meddling)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
    assert set(rates) == {0.05}
    value = run.metrics.registry.get_sample_value
    assert value("tolaria.lr_controller.integrity_violations_total", {"group": "host"}) == 1
    assert run.events.count("tolaria.lr_integrity_violation") == 1


async def test_a_seed_that_kasmina_desires_grows_and_shows() -> None:
    """Desired at one boundary it trains from the next step on, with its group, its rate and its place in the state."""
    seed = SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp")
    peers = FakePeers(seeds=[seed])
    async with running(new_run(peers, job="SlotJob", epochs=3)) as run:
        await run.until(lambda: run.state == "FINISHED")
    (told,) = peers.states[-1].seed_states
    assert (told.seed_id, told.slot) == ("a", "middle")
    assert told.gradient_norm > 0
    assert set(run.run.status().learning_rates) == {"host", "seed:a"}
    value = run.metrics.registry.get_sample_value
    assert value("tolaria.seeds.active", {"stage": "training"}) == 1
    assert value("tolaria.opt.rebuilds_total") == 1
    assert "tolaria.opt_rebuilt" in run.events


async def test_a_seed_command_that_kasmina_refuses_is_not_applied() -> None:
    """Her no counts as a refusal, with her words."""
    peers = once(command(COMMAND_SEED))
    peers.takes = False
    run = await finished(peers)
    assert run.status.commands_accepted == 0
    assert run.sample("tolaria.command.rejected_total", {"reason": "refused"}) == 1


async def test_a_rate_change_whose_caller_goes_away_is_made_once() -> None:
    """The client hangs up while the lane is busy; its repeat finds the change made, counted and shown once."""
    run = new_run(FakePeers(), job="GatedJob", epochs=10**6)
    async with running(run):
        job = run.job
        request = AdjustLearningRateRequest(request_id="1", reason="calm", factor=0.5)
        with anyio.move_on_after(0.05):
            await run.run.adjust_learning_rate(request)
        job.passes.release(10**6)
        await run.run.adjust_learning_rate(request)
        assert run.run.status().learning_rates == {"host": 0.025}
        value = run.metrics.registry.get_sample_value
        assert value("tolaria.lr_controller.adjustments_total", {"origin": "operator"}) == 1
        await run.run.stop("enough")
