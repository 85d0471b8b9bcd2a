from __future__ import annotations

import time

import anyio.to_thread
import pytest
import torch

from leyline.v1.admin_service_pb2 import GetStatusResponse
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    COMMAND_EMERGENCY,
    EMERGENCY_LEVEL_CONSERVATIVE,
    EMERGENCY_LEVEL_ELEVATED,
    EMERGENCY_LEVEL_HALT,
    EMERGENCY_LEVEL_NOTICE,
    EMERGENCY_LEVEL_UNSPECIFIED,
    HEALTH_STATUS_CRITICAL,
    HEALTH_STATUS_UNHEALTHY,
    EmergencyLevel,
)
from leyline.v1.state_pb2 import SystemStatePacket
from support.boards import acknowledgements
from support.peers import command
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.config import ControlSettings
from tolaria.emergency import Phase
from tolaria.errors import IllegalEmergencyEventError, UnknownLevelError, WrongStateError
from tolaria.journal.rows import EmergencyRow
from tolaria.signals import SignalBoard

pytestmark = pytest.mark.anyio


def forever(peers: FakePeers | None = None) -> RunUnderTest:
    """Returns a run that does not end by itself, and whose boundaries are within their budget."""
    control = ControlSettings(boundary_budget_ms=5000, tamiyo_budget_ms=4000)
    return new_run(peers or FakePeers(), epochs=10**6, control=control)


def parameters(run: RunUnderTest) -> list[torch.Tensor]:
    """Returns copies of the model's parameters."""
    return [p.detach().clone() for p in run.module.parameters]


async def test_a_halt_freezes_training_until_it_is_cleared_and_resumed() -> None:
    """It is acknowledged at once, no parameter changes, and a resume continues at the same step."""
    run = forever()
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        began_s = time.monotonic()
        state = await run.safety.raise_emergency(EMERGENCY_LEVEL_HALT, "smoke", run.status)
        assert time.monotonic() - began_s < 30.0  # without waiting for a timeout, on a busy machine too
        assert state.phase is Phase.ANSWERED
        assert [given.participant for given in state.acknowledgements] == ["tolaria"]
        assert run.state == "HALTED"
        assert run.run.status().health.status == HEALTH_STATUS_CRITICAL
        assert "halted: smoke; clear the emergency" in run.run.status().health.summary
        step, before = run.status.global_step, parameters(run)
        with pytest.raises(WrongStateError, match="clear it first"):
            await run.run.resume("now")
        await run.run.pause("and look")
        assert run.state == "HALTED"
        assert run.status.state_reason == "emergency: smoke"
        await run.lane_answers()
        run.safety.clear_emergency("no smoke")
        assert run.state == "HALTED"
        assert run.status.state_reason == "halted, and cleared: resume it (tolaria resume). It was halted by: smoke"
        assert run.run.status().emergency_level == EMERGENCY_LEVEL_UNSPECIFIED
        assert run.run.status().health.status == HEALTH_STATUS_UNHEALTHY
        with pytest.raises(IllegalEmergencyEventError, match="no emergency; the run is halted, and cleared: resume it"):
            run.safety.clear_emergency("again")
        assert all(torch.equal(a, b) for a, b in zip(before, parameters(run), strict=True))
        assert run.status.global_step == step
        await run.run.resume("go on")
        await run.until(lambda: run.status.global_step > step)
        await run.run.stop("enough")
    assert run.sample("tolaria.emergency.halts_total") == 1
    assert run.sample("tolaria.emergency.halt") == 0
    assert run.sample("tolaria.emergency.broadcasts_total") == 1
    names = ("tolaria.emergency.escalated", "tolaria.emergency.halt", "emergency_broadcast")
    assert [run.events.count(name) for name in (*names, "tolaria.emergency.cleared")] == [1, 1, 1, 1]


async def test_a_paused_run_is_halted_too() -> None:
    """The halt is acknowledged at once, also by a run that has ended; a resume requires a clearance."""
    run = forever()
    async with running(run):
        await run.run.pause("look")
        assert (await run.safety.raise_emergency(EMERGENCY_LEVEL_HALT, "smoke", run.status)).phase is Phase.ANSWERED
        assert run.state == "HALTED"
        run.safety.clear_emergency("fine")
        await run.run.resume("on")
        await run.run.stop("enough")
        assert (await run.safety.raise_emergency(EMERGENCY_LEVEL_HALT, "late", run.status)).phase is Phase.ANSWERED
        assert run.state == "FINISHED"


async def test_a_peer_halts_the_run_through_the_board() -> None:
    """A signal on the board halts without an RPC or a command, and a clearance on the board allows a resume."""
    run = forever()
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        other = await anyio.to_thread.run_sync(SignalBoard.attach, run.board.path)
        other.claim("kasmina").raise_level(EMERGENCY_LEVEL_HALT, "the seeds burn")
        await run.until(lambda: run.state == "HALTED")
        signal = other.effective()
        assert signal is not None
        await run.until(lambda: "tolaria" in acknowledgements(other, signal.signal_id))
        other.claim("operator").clear_all()
        await run.until(lambda: not run.safety.halting)
        await run.run.resume("on")
        await run.run.stop("enough")
        other.close()


@pytest.mark.parametrize("level", [EMERGENCY_LEVEL_NOTICE, EMERGENCY_LEVEL_ELEVATED, EMERGENCY_LEVEL_CONSERVATIVE])
async def test_lower_levels_let_training_go_on(level: EmergencyLevel.ValueType) -> None:
    """They are acknowledged at once; the conservative level enters the mode until healthy epochs end the emergency."""
    run = forever()
    async with running(run):
        await run.run.pause("no epoch may end here")
        state = await run.safety.raise_emergency(level, "smell", run.status)
        assert (state.level, state.phase) == (level, Phase.ANSWERED)
        assert (run.safeguards.mode.reasons == ("emergency",)) is (level == EMERGENCY_LEVEL_CONSERVATIVE)
        assert run.run.status().emergency_level == level
        await run.run.resume("on")
        await run.until(lambda: run.safety.controller.state.phase is Phase.CALM)
        assert not run.safeguards.mode.on
        await run.run.stop("enough")


async def test_invalid_requests_change_nothing() -> None:
    """An unknown level and a clearance without an emergency are refused."""
    run = forever()
    async with running(run):
        await run.until(lambda: run.state == "RUNNING")
        with pytest.raises(UnknownLevelError):
            await run.safety.raise_emergency(9, "what", run.status)  # type: ignore[arg-type] # on purpose
        with pytest.raises(IllegalEmergencyEventError):
            run.safety.clear_emergency("nothing")
        await run.run.stop("enough")
    status = GetStatusResponse()
    run.safety.add_to(status)
    assert status.emergency_level == EMERGENCY_LEVEL_UNSPECIFIED


async def test_late_boundaries_never_halt_the_run() -> None:
    """Every boundary is a breach: the first raises NOTICE, the open breaker ELEVATED, and training goes on."""
    control = ControlSettings(boundary_budget_ms=0.01, tamiyo_budget_ms=0.01, boundary_slack_ms=0.01)
    run = new_run(FakePeers(), control=control, epochs=20)
    async with running(run):
        await run.until(lambda: run.state in {"HALTED", "FINISHED"})
    assert (run.state, run.status.rollbacks) == ("FINISHED", 0)
    assert run.sample("tolaria.epochs.failed") == 0
    levels = [e.attributes["emergency_level"] for e in run.emitter.events if e.name == "tolaria.emergency.escalated"]
    assert levels == ["notice", "elevated"]


async def test_failed_epochs_in_a_row_halt_the_run() -> None:
    """Those whose training was ill."""
    run = forever()
    async with running(run):
        for _ in range(3):
            run.safeguards.epoch_failing("loss_explosion")
            run.safety.epoch_over(breach=False)
        assert run.state == "HALTED"
        assert run.status.state_reason == "emergency: failed_epoch_streak: 3 epochs in a row"
        await run.run.stop("enough")


@pytest.mark.parametrize("level", ["halt", "EMERGENCY_LEVEL_HALT", "4"])
async def test_the_controller_can_raise_an_emergency(level: str) -> None:
    """COMMAND_EMERGENCY names the level by name or number."""

    async def once(state: SystemStatePacket) -> AdaptationCommand | None:
        made = command(COMMAND_EMERGENCY)
        made.annotations["level"] = level
        return made if state.current_epoch == 1 else None

    run = forever(FakePeers(once))
    async with running(run):
        await run.until(lambda: run.state == "HALTED")
        assert run.safety.controller.state.origin == "tamiyo"
        assert run.status.commands_accepted == 1
        await run.run.stop("enough")


@pytest.mark.parametrize("level", ["", "0", "unspecified", "panic"])
async def test_an_emergency_command_without_a_level_is_malformed(level: str) -> None:
    """It is rejected, and there is no emergency."""

    async def once(state: SystemStatePacket) -> AdaptationCommand | None:
        made = command(COMMAND_EMERGENCY)
        made.annotations["level"] = level
        return made if state.current_epoch == 1 else None

    async with running(new_run(FakePeers(once), epochs=2)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert run.sample("tolaria.command.rejected_total", {"reason": "malformed"}) == 1


async def test_a_halt_outlives_the_process_until_it_is_cleared() -> None:
    """A run that was halted when its process ended is halted in the next one; clearing completes the journal's row."""
    row = EmergencyRow("e1", 7, "run", "halt", "operator", 3, "smoke")
    run = new_run(FakePeers(), epochs=10**6, active_halt=row)
    async with running(run):
        await run.until(lambda: run.state == "HALTED")
        assert (run.status.state_reason, run.status.global_step) == ("emergency: smoke", 0)
        run.safety.clear_emergency("no smoke")
        await run.run.resume("on")
        await run.until(lambda: run.status.global_step > 3)
        await run.journal.flush(5)
        rows = await anyio.to_thread.run_sync(run.storage.journal.rows, EmergencyRow)
        await run.run.stop("enough")
    assert [(kept.emergency_id, kept.at_ns, kept.cleared_at_ns is not None) for kept in rows] == [("e1", 7, True)]


async def test_a_halt_that_is_cleared_before_the_run_starts_is_not_raised_again() -> None:
    """Requests are answered while the service is still starting; a resume before the clearance is refused."""
    run = new_run(FakePeers(), epochs=10**6, active_halt=EmergencyRow("e1", 7, "run", "halt", "operator", 3, "smoke"))
    with pytest.raises(WrongStateError, match="clear it first"):
        await run.run.resume("too early")
    run.safety.clear_emergency("no smoke")
    async with running(run):
        await run.run.resume("on")
        await run.until(lambda: run.status.global_step > 3)
        assert (run.state, run.safety.halting) == ("RUNNING", False)
        await run.run.stop("enough")


async def test_a_run_whose_silent_process_was_replaced_trains_on() -> None:
    """A board adopted with the halt of the sentinel: it concerned the process that this one has replaced."""
    run = new_run(FakePeers(), epochs=10**6)
    await anyio.to_thread.run_sync(adopt_with_halt_of, run, "sentinel")
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        assert (run.state, run.safety.halting, run.run.status().health.summary) == ("RUNNING", False, "")
        await run.run.stop("enough")


async def test_a_halt_of_others_on_an_adopted_board_stays() -> None:
    """Only what the sentinel alone raised ends with the silent process."""
    run = new_run(FakePeers(), epochs=10**6)
    await anyio.to_thread.run_sync(adopt_with_halt_of, run, "sentinel", "kasmina")
    async with running(run):
        await run.until(lambda: run.state == "HALTED" and run.safety.halting)
        assert run.status.global_step == 0
        await run.run.stop("enough")


def adopt_with_halt_of(run: RunUnderTest, *participants: str) -> None:
    """Makes the board as a crashed process leaves it to the next one, with a halt of each participant."""
    with SignalBoard.attach(run.board.path) as other:
        for name in participants:
            other.claim(name).raise_level(EMERGENCY_LEVEL_HALT, "heartbeat_silent: no heartbeat of the event loop")
    run.board.adopted = True


async def test_an_epoch_repaired_by_a_rollback_is_not_a_failed_one() -> None:
    """Spikes that rollbacks undo do not count towards the streak of failed epochs; they have a separate budget."""
    options = {"corrupted": [[epoch, place] for epoch in (3, 6, 9, 12) for place in (3, 4)], "factor": 1e4}
    rollback = {"every_steps": 2, "fast_budget_s": 10.0, "automatic_max": 9, "per_steps": 5}
    sections: dict[str, object] = {"rollback": rollback, "health": {"skip_extreme": False}}
    run = new_run(FakePeers(), job="CorruptedDataJob", epochs=14, options=options, sections=sections)
    async with running(run):
        await run.until(lambda: run.state in {"FINISHED", "HALTED"})
    assert run.state == "FINISHED"
    assert run.status.rollbacks >= 1
