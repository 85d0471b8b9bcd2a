from __future__ import annotations

import anyio
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    COMMAND_ROLLBACK,
    EMERGENCY_LEVEL_CONSERVATIVE,
    EMERGENCY_LEVEL_HALT,
    ROLLBACK_TIER_FAST,
    ROLLBACK_TIER_FULL,
    ROLLBACK_TIER_UNSPECIFIED,
)
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import command
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.errors import NoCheckpointError, RestoreAbandonedError, WrongStateError
from tolaria.signals import RollbackState
from tolaria.rollback.protocol import Rollback

pytestmark = pytest.mark.anyio

# Budgets that a busy machine keeps to.
BY_ORDER = {"automatic": False, "every_steps": 3, "fast_budget_s": 10.0}
AUTOMATIC = {"automatic": True, "every_steps": 2, "warmup_steps": 5, "fast_budget_s": 10.0}


def spoilt_run(*places: tuple[int, int], by: float = 1e4, **rollback: object) -> RunUnderTest:
    """A run whose batches at these (epoch, place) are spoilt."""
    options = {"spoilt": [list(place) for place in places], "by": by}
    sections: dict[str, object] = {"rollback": {**AUTOMATIC, **rollback}}
    return new_run(FakePeers(), job="SpoiltJob", sections=sections, epochs=6, options=options)


async def finished(run: RunUnderTest) -> RunUnderTest:
    """Let it come to its end."""
    async with running(run):
        await run.until(lambda: run.state in {"FINISHED", "FAILED", "HALTED"})
    return run


def value(run: RunUnderTest, name: str, **labels: str) -> float | None:
    """A metric's value."""
    return run.sample(f"tolaria.{name}", labels)


@pytest.mark.parametrize("by", [1e4, float("nan")])
async def test_a_spike_is_undone_and_its_batch_passed_over(by: float) -> None:
    """The run goes back by itself, leaves the batch out, cuts the rate for a while, and comes to a good end."""
    run = await finished(spoilt_run((3, 4), by=by, lr_cut_steps=3))
    assert run.state == "FINISHED"
    assert run.module.skipped_batches >= {(3, 4)}
    assert run.status.rollbacks == 1
    assert run.status.last_epoch is not None
    assert run.status.last_epoch.evaluation.loss < 10.0  # spoilt for good it has hundreds
    assert run.events.count("tolaria.rollback.completed") == 1
    assert run.events.count("tolaria.loss_explosion") == (by == 1e4)
    assert value(run, "rollback.duration_seconds_count", tier="fast", outcome="restored") == 1
    assert value(run, "lr_controller.adjustments_total", origin="rollback") == 1
    assert "rollback" not in [live.adjustment.origin for live in run.status.adjustments]
    assert run.module.global_step == 6 * 8 - len(run.module.skipped_batches)


async def test_without_automatic_rollbacks_nothing_goes_back() -> None:
    """The setting switches the judge off."""
    run = await finished(spoilt_run((3, 4), by=3.0, automatic=False))
    assert (run.state, run.status.rollbacks) == ("FINISHED", 0)


async def test_a_spent_budget_halts() -> None:
    """Spikes that rollbacks do not mend end in HALT, not in a loop."""
    places = [(epoch, place) for epoch in (2, 3, 4) for place in range(8)]
    run = await finished(spoilt_run(*places, automatic_max=2))
    assert run.state == "HALTED"
    assert "rollback_budget_spent" in run.status.state_reason
    assert run.status.rollbacks <= 2
    assert run.safety.controller.state.level == EMERGENCY_LEVEL_HALT


async def test_operators_roll_back_a_run_that_goes_on_from_there() -> None:
    """The two digests are equal, the status shows it, and training goes on; a paused run stays paused."""
    run = new_run(FakePeers(), epochs=10**6, sections={"rollback": BY_ORDER})
    async with running(run):
        await run.until(lambda: run.status.global_step > 40)
        outcome = await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, None, "looks odd", "operator"))
        assert outcome.state_digest == outcome.expected_digest != ""
        assert outcome.restored_step % 3 == 0
        assert run.run.status().rollbacks == 1
        step = run.status.global_step
        await run.until(lambda: run.status.global_step > step + 10)
        await run.run.pause("look")
        back = await run.run.roll_back(Rollback(ROLLBACK_TIER_UNSPECIFIED, None, "again", "operator"))
        assert run.status.global_step == back.restored_step
        assert run.state == "PAUSED"
        await anyio.sleep(0.05)
        assert run.module.global_step == back.restored_step
        run.run.resume("on")
        await run.until(lambda: run.status.global_step > back.restored_step + 10)
        await run.run.stop("enough")
    assert run.state == "FINISHED"


async def test_going_back_into_an_earlier_epoch_runs_that_epoch_again() -> None:
    """Epochs are counted from where the run has come back to, and each is finished once more."""
    run = new_run(FakePeers(), epochs=4, sections={"rollback": BY_ORDER}, job="GatedJob")
    async with running(run):
        for _ in range(8 + 5):
            run.job.passes.release()
        for _ in range(14):
            await anyio.to_thread.run_sync(run.job.entered.acquire)
        errand = run.recovery.begin(Rollback(ROLLBACK_TIER_FAST, 7, "back", "operator"))
        for _ in range(100):
            run.job.passes.release()
        await errand.over.wait()
        assert errand.outcome is not None
        assert errand.outcome.restored_step == 6
        await run.until(lambda: run.state == "FINISHED")
    assert run.module.global_step == 4 * 8
    assert run.status.last_epoch is not None
    assert run.status.last_epoch.epoch == 4


async def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    """No point, an ended run, a second one at once: each says so, and training goes on."""
    run = new_run(FakePeers(), epochs=10**6, sections={"rollback": BY_ORDER})
    async with running(run):
        await run.until(lambda: run.status.global_step > 5)
        with pytest.raises(NoCheckpointError, match="full"):
            await run.run.roll_back(Rollback(ROLLBACK_TIER_FULL, None, "x", "operator"))
        assert value(run, "rollback.failures_total", stage="locate", reason="no_point") == 1
        assert "tolaria.rollback.restore_failed" in run.events
        step = run.status.global_step
        await run.until(lambda: run.status.global_step > step)
        first = run.recovery.begin(Rollback(ROLLBACK_TIER_FAST, None, "x", "operator"))
        with pytest.raises(WrongStateError, match="another rollback"):
            run.recovery.begin(Rollback(ROLLBACK_TIER_FAST, None, "y", "operator"))
        await first.over.wait()
        await run.run.stop("enough")
        with pytest.raises(WrongStateError, match="ended"):
            await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, None, "x", "operator"))


@pytest.mark.parametrize("halts", [True, False])
async def test_a_missed_deadline_is_told_everywhere_and_halts_if_that_is_set(halts: bool) -> None:
    """The lane is stuck in a step: the rollback is given up in time, the board shows it, the state is as it was."""
    rollback = {"automatic": False, "fast_budget_s": 0.1, "halt_on_deadline": halts, "every_steps": 1}
    run = new_run(FakePeers(), job="GatedJob", epochs=3, sections={"rollback": rollback})
    async with running(run):
        for _ in range(4):
            run.job.passes.release()
        for _ in range(5):
            await anyio.to_thread.run_sync(run.job.entered.acquire)
        with pytest.raises(RestoreAbandonedError):
            await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, 2, "back", "operator"))
        shown = await anyio.to_thread.run_sync(run.board.read_rollback)
        assert shown is not None
        assert shown.state is RollbackState.DEADLINE
        assert value(run, "rollback.deadline_exceeded_total") == 1
        for _ in range(100):
            run.job.passes.release()
        if halts:
            await run.until(lambda: run.state == "HALTED")
            assert "rollback_deadline_missed" in run.status.state_reason
        else:
            await run.until(lambda: run.state == "FINISHED")
            assert run.module.global_step == 3 * 8


@pytest.mark.parametrize(
    ("payload", "rejected"),
    [
        ({"tier": "fast", "reason": "r"}, ""),
        ({}, ""),
        ({"tier": "full"}, "refused"),
        ({"tier": "slow"}, "malformed"),
        ({"target_step": -1}, "malformed"),
    ],
)
async def test_the_controller_has_the_run_roll_back(payload: dict[str, object], rejected: str) -> None:
    """COMMAND_ROLLBACK is carried out as its payload says; one that makes no sense is refused."""
    told: list[AdaptationCommand] = []

    async def answer(_state: SystemStatePacket) -> AdaptationCommand | None:
        if told:
            return None
        message = command(COMMAND_ROLLBACK)
        message.rollback_payload.update(payload)  # type: ignore[arg-type] # what a Struct can hold
        told.append(message)
        return message

    run = await finished(new_run(FakePeers(answer), epochs=4, sections={"rollback": BY_ORDER}))
    assert run.state == "FINISHED"
    assert run.status.rollbacks == (not rejected)
    if rejected:
        assert value(run, "command.rejected_total", reason=rejected) == 1
        assert value(run, "command.applied_total", type="rollback") is None
    else:
        assert value(run, "command.applied_total", type="rollback") == 1


@pytest.mark.parametrize("rolls_back", [True, False])
async def test_an_emergency_of_the_third_level_goes_back(rolls_back: bool) -> None:
    """CONSERVATIVE asks for a fast rollback, unless the settings do not want it."""
    sections = {"emergency": {"rollback": rolls_back}, "rollback": BY_ORDER}
    run = new_run(FakePeers(), epochs=10**6, sections=sections)
    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        run.safety.controller.escalate(EMERGENCY_LEVEL_CONSERVATIVE, "odd", "kasmina")
        step = run.status.global_step
        await run.until(lambda: run.status.global_step > step + 50 and not run.recovery.running)
        assert run.status.rollbacks == rolls_back
        await run.run.stop("enough")
