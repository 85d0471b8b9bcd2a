from __future__ import annotations

import threading
from typing import Any

import anyio.to_thread
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
from tolaria.checkpoint.store import LoadedCheckpoint
from tolaria.errors import LaneError, NoCheckpointError, RestoreAbandonedError, WrongStateError
from tolaria.journal.rows import RollbackRow
from tolaria.lane.messages import AcceptRegime, Command, StepDone
from tolaria.rollback.protocol import Rollback
from tolaria.run.verdicts import Verdict
from tolaria.signals import RollbackState

pytestmark = pytest.mark.anyio

# Budgets that a busy machine keeps.
ON_REQUEST = {"automatic": False, "every_steps": 3, "fast_budget_s": 10.0}
AUTOMATIC = {"automatic": True, "every_steps": 2, "fast_budget_s": 10.0}


def spoiled_run(*places: tuple[int, int], by: float = 1e4, **rollback: object) -> RunUnderTest:
    """Returns a run of six epochs whose batches at these (epoch, place) are spoiled, and trained with."""
    options = {"corrupted": [list(place) for place in places], "factor": by}
    sections: dict[str, object] = {"rollback": {**AUTOMATIC, **rollback}, "health": {"skip_extreme": False}}
    return new_run(FakePeers(), job="CorruptedDataJob", sections=sections, epochs=6, options=options)


async def finished(run: RunUnderTest) -> RunUnderTest:
    """Runs to the end."""
    async with running(run):
        await run.until(lambda: run.state in {"FINISHED", "FAILED", "HALTED"})
    return run


def fast(target_step: int | None = None, reason: str = "odd") -> Rollback:
    """Returns an operator's rollback to a snapshot."""
    return Rollback(ROLLBACK_TIER_FAST, target_step, reason, "operator")


def value(run: RunUnderTest, name: str, **labels: str) -> float | None:
    """Returns the value of a metric."""
    return run.sample(f"tolaria.{name}", labels)


async def test_a_spike_is_undone_and_its_batch_is_skipped() -> None:
    """An automatic rollback skips the batches and cuts the rate for some steps; the run finishes with a good loss."""
    run = await finished(spoiled_run((3, 4), (3, 5), lr_cut_steps=3))
    assert run.state == "FINISHED"
    assert run.module.skipped.added >= {(3, 4), (3, 5)}
    assert run.status.rollbacks == 1
    assert run.status.last_epoch is not None
    assert run.status.last_epoch.evaluation.loss < 10.0  # it is in the hundreds when the spike is not undone
    assert run.events.count("tolaria.rollback.completed") == 1
    assert run.events.count("tolaria.loss_explosion") == 1
    assert value(run, "rollback.duration_seconds_count", tier="fast", outcome="restored") == 1
    assert value(run, "lr_controller.adjustments_total", origin="rollback") == 1
    assert "rollback" not in [active.adjustment.origin for active in run.status.adjustments]
    assert run.module.global_step == 6 * 8 - len(run.module.skipped.added)


async def test_automatic_rollbacks_can_be_switched_off() -> None:
    """With rollback.automatic=false a spike is not undone."""
    run = await finished(spoiled_run((3, 4), by=3.0, automatic=False))
    assert (run.state, run.status.rollbacks) == ("FINISHED", 0)


async def test_a_spent_budget_halts() -> None:
    """An explosion after the last rollback of the budget ends in HALT, not in a loop."""
    run = spoiled_run((3, 4), (3, 5), automatic_max=2)
    for at in (0, 1):
        run.health.begin_rollback("tamiyo", at)
        run.health.end_retreat()
    await finished(run)
    assert run.state == "HALTED"
    assert "rollback_budget_spent" in run.status.state_reason
    assert run.status.rollbacks == 0
    assert run.safety.controller.state.level == EMERGENCY_LEVEL_HALT


async def test_a_run_continues_after_an_operators_rollback() -> None:
    """The two digests are equal, the status counts it, and training goes on; a paused run stays paused."""
    run = new_run(FakePeers(), epochs=10**6, sections={"rollback": ON_REQUEST})
    async with running(run):
        await run.until(lambda: run.status.global_step > 40)
        back = await run.run.roll_back(fast())
        assert back.state_digest == back.expected_digest != ""
        assert back.restored_step % 3 == 0
        assert run.run.status().rollbacks == 1
        step = run.status.global_step
        await run.until(lambda: run.status.global_step > step + 10)
        await run.run.pause("look")
        again = await run.run.roll_back(Rollback(ROLLBACK_TIER_UNSPECIFIED, None, "again", "operator"))
        assert run.status.global_step == again.restored_step
        assert run.state == "PAUSED"
        await run.lane_answers()
        assert run.module.global_step == again.restored_step
        await run.run.resume("on")
        await run.until(lambda: run.status.global_step > again.restored_step + 10)
        await run.run.stop("enough")
    assert run.state == "FINISHED"


async def test_a_rollback_into_an_earlier_epoch_repeats_that_epoch() -> None:
    """Training continues within the restored epoch, and every epoch has all its steps in the end."""
    run = new_run(FakePeers(), epochs=4, sections={"rollback": ON_REQUEST}, job="GatedJob")
    ended: list[Rollback] = []
    async with running(run):
        run.job.passes.release(8 + 5)
        for _ in range(14):
            await anyio.to_thread.run_sync(run.job.entered.acquire)
        run.recovery.begin(fast(7), ended.append)
        run.job.passes.release(100)
        await run.until(lambda: bool(ended))
        assert ended[0].restored_step == 6
        await run.until(lambda: run.state == "FINISHED")
    assert run.module.global_step == 4 * 8
    assert run.status.last_epoch is not None
    assert run.status.last_epoch.epoch == 4


async def test_impossible_rollbacks_are_refused_and_change_nothing() -> None:
    """Without a restore point, while another one runs, after the end: the error says why, and training goes on."""
    run = new_run(FakePeers(), epochs=10**6, sections={"rollback": ON_REQUEST})
    async with running(run):
        await run.until(lambda: run.status.global_step > 5)
        with pytest.raises(NoCheckpointError, match="full"):
            await run.run.roll_back(Rollback(ROLLBACK_TIER_FULL, None, "x", "operator"))
        assert value(run, "rollback.failures_total", stage="locate", reason="no_point") == 1
        assert "tolaria.rollback.restore_failed" in run.events
        step = run.status.global_step
        await run.until(lambda: run.status.global_step > step)
        run.recovery.begin(fast())
        with pytest.raises(WrongStateError, match="another rollback"):
            run.recovery.begin(fast())
        await run.until(lambda: not run.recovery.running)
        await run.run.stop("enough")
        with pytest.raises(WrongStateError, match="ended"):
            await run.run.roll_back(fast())


async def test_a_missed_deadline_leaves_the_state_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is slow: the rollback is given up in time, board, metrics and error say so, and training goes on."""
    rollback = {"automatic": False, "full_budget_s": 0.2, "every_steps": 1}
    run = new_run(FakePeers(), epochs=10**6, sections={"rollback": rollback})
    gate = threading.Event()
    load = run.storage.checkpoints.load_first

    def slow(*arguments: Any) -> LoadedCheckpoint:
        assert gate.wait(180)
        return load(*arguments)

    monkeypatch.setattr(run.storage.checkpoints, "load_first", slow)
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        await run.run.checkpoint("to go back to")
        with pytest.raises(RestoreAbandonedError):
            await run.run.roll_back(Rollback(ROLLBACK_TIER_FULL, None, "odd", "operator"))
        gate.set()
        shown = await anyio.to_thread.run_sync(run.board.read_rollback)
        assert shown is not None
        assert shown.state is RollbackState.DEADLINE
        assert value(run, "rollback.deadline_exceeded_total") == 1
        step = run.status.global_step
        await run.until(lambda: run.status.global_step > step + 3)
        assert run.state == "RUNNING"
        await run.run.stop("enough")


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
async def test_the_controller_can_roll_the_run_back(payload: dict[str, object], rejected: str) -> None:
    """COMMAND_ROLLBACK is carried out as its payload says; an invalid or impossible one is rejected."""
    issued: list[AdaptationCommand] = []

    async def answer(_state: SystemStatePacket) -> AdaptationCommand | None:
        if issued:
            return None
        message = command(COMMAND_ROLLBACK)
        message.rollback_payload.update(payload)  # type: ignore[arg-type] # values that a Struct can hold
        issued.append(message)
        return message

    run = await finished(new_run(FakePeers(answer), epochs=4, sections={"rollback": ON_REQUEST}))
    assert run.state == "FINISHED"
    assert run.status.rollbacks == (not rejected)
    if rejected:
        assert value(run, "command.rejected_total", reason=rejected) == 1
        assert value(run, "command.applied_total", type="rollback") == 0
    else:
        assert value(run, "command.applied_total", type="rollback") == 1


async def test_the_controller_goes_further_back_each_time_to_a_named_step_too() -> None:
    """Its second rollback to the same step takes an older point than the one that the first has restored."""
    asked = 0

    async def answer(state: SystemStatePacket) -> AdaptationCommand | None:
        nonlocal asked
        if asked == 2 or run.status.rollbacks < asked or state.current_epoch < 3:
            return None
        asked += 1
        back = command(COMMAND_ROLLBACK)
        back.rollback_payload.update({"target_step": 12, "tier": "fast"})
        return back

    rollback = {**ON_REQUEST, "snapshots_max": 100}
    run = new_run(FakePeers(answer), epochs=10**6, sections={"rollback": rollback})
    async with running(run):
        await run.until(lambda: run.status.rollbacks == 2)
        rows = await anyio.to_thread.run_sync(lambda: run.storage.journal.rows(RollbackRow, run_id="run"))
        await run.run.stop("enough")
    assert sorted(row.restored_step for row in rows) == [9, 12]


async def test_a_changed_task_that_the_lane_cannot_accept_is_judged_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Health follows the lane's answer, whatever it is."""
    answered: list[bool] = []

    def fail(_reason: str, *, announced: bool) -> None:
        raise LaneError(f"announced: {announced}")

    run = new_run(FakePeers(), epochs=10**6)
    monkeypatch.setattr(run.module, "begin_regime", fail)
    monkeypatch.setattr(run.health, "regime_answered", lambda *, accepted: answered.append(accepted))
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        with pytest.raises(LaneError):
            await run.core.lane.call(AcceptRegime("other data", ()))
        assert answered == [False]
        monkeypatch.setattr(run.module, "begin_regime", lambda _reason, *, announced: None)
        await run.core.lane.call(AcceptRegime("other data", ()))
        assert answered == [False, True]
        await run.run.stop("enough")


async def test_a_changed_task_that_cannot_be_queued_is_judged_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many commands wait for the lane: there is no answer to follow, and health is told at once."""
    run = new_run(FakePeers(), epochs=10**6)
    send, step, verdicts, answered = run.core.handle.send, run.health.step, [AcceptRegime("other data", ())], []

    def full(command_id: int, command: Command) -> None:
        if isinstance(command, AcceptRegime):
            raise LaneError("256 commands are waiting for a step boundary already")
        send(command_id, command)

    def judged(done: StepDone, *, rolling_back: bool) -> Verdict:
        verdict = step(done, rolling_back=rolling_back)
        return verdicts.pop() if verdicts else verdict

    monkeypatch.setattr(run.core.handle, "send", full)
    monkeypatch.setattr(run.health, "step", judged)
    monkeypatch.setattr(run.health, "regime_answered", lambda *, accepted: answered.append(accepted))
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        await run.run.stop("enough")
    assert answered == [False]


async def test_a_conservative_emergency_rolls_nothing_back() -> None:
    """It enters conservative mode only; rollbacks are begun by health, operators and the controller."""
    run = new_run(FakePeers(), epochs=10**6, sections={"rollback": ON_REQUEST})
    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        run.safety.controller.escalate(EMERGENCY_LEVEL_CONSERVATIVE, "odd", "kasmina")
        assert "emergency" in run.safeguards.mode.reasons
        step = run.status.global_step
        await run.until(lambda: run.status.global_step > step + 50)
        assert run.status.rollbacks == 0
        await run.run.stop("enough")
