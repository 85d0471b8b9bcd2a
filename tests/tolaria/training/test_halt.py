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
    EmergencyLevel,
)
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import command
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.config import ControlSettings
from tolaria.emergency import Phase
from tolaria.errors import IllegalEmergencyEventError, UnknownLevelError, WrongStateError
from tolaria.journal.rows import EmergencyRow
from tolaria.signals import SignalBoard
from tolaria.training.safety_desk import SafetyDesk

pytestmark = pytest.mark.anyio


def forever(peers: FakePeers | None = None) -> RunUnderTest:
    """A run that does not end by itself, and whose boundaries are no breach."""
    control = ControlSettings(boundary_budget_ms=5000, tamiyo_budget_ms=4000)
    return new_run(peers or FakePeers(), epochs=10**6, control=control)


def parameters(run: RunUnderTest) -> list[torch.Tensor]:
    """Copies of the model's parameters."""
    return [p.detach().clone() for p in run.rig.parameters]


async def test_a_halt_freezes_training_until_it_is_cleared_and_resumed() -> None:
    """Frozen and acknowledged at once; no parameter moves; it goes on from the same step, and only when asked to."""
    run = forever()
    desk = SafetyDesk(run.loop, run.guardian)
    async with running(run):
        await run.until(lambda: run.progress.global_step > 3)
        began_s = time.monotonic()
        state = await desk.raise_emergency(EMERGENCY_LEVEL_HALT, "smoke")
        assert time.monotonic() - began_s < 1.0  # ten times the 100 ms that it may take
        assert state.phase is Phase.ANSWERED
        assert [given.participant for given in state.acknowledgements] == ["tolaria"]
        assert run.state == "HALTED"
        step, before = run.progress.global_step, parameters(run)
        with pytest.raises(WrongStateError, match="clear it first"):
            run.loop.resume("now")
        await run.loop.pause("and look")
        assert run.state == "HALTED"
        assert run.progress.state_reason == "emergency: smoke"
        assert await anyio.to_thread.run_sync(lambda: not run.parts.link._lane.join(0.1))
        desk.clear_emergency("no smoke")
        assert run.state == "HALTED"
        assert run.loop.status().emergency_level == EMERGENCY_LEVEL_UNSPECIFIED
        assert all(torch.equal(a, b) for a, b in zip(before, parameters(run), strict=True))
        assert run.progress.global_step == step
        run.loop.resume("go on")
        await run.until(lambda: run.progress.global_step > step)
        await run.loop.stop("enough")
    value = run.metrics.registry.get_sample_value
    assert value("tolaria.emergency.halts_total") == 1
    assert value("tolaria.emergency.halt") == 0
    assert value("tolaria.emergency.broadcasts_total") == 1
    names = ("tolaria.emergency.escalated", "tolaria.emergency.halt", "emergency_broadcast")
    assert [run.events.count(name) for name in (*names, "tolaria.emergency.cleared")] == [1, 1, 1, 1]


async def test_a_run_that_stands_already_is_halted_too() -> None:
    """Paused before: acknowledged at once, and resuming needs the emergency cleared."""
    run = forever()
    desk = SafetyDesk(run.loop, run.guardian)
    async with running(run):
        await run.loop.pause("look")
        assert (await desk.raise_emergency(EMERGENCY_LEVEL_HALT, "smoke")).phase is Phase.ANSWERED
        assert run.state == "HALTED"
        desk.clear_emergency("fine")
        run.loop.resume("on")
        await run.loop.stop("enough")
        assert (await desk.raise_emergency(EMERGENCY_LEVEL_HALT, "late")).phase is Phase.ANSWERED
        assert run.state == "FINISHED"


async def test_a_peer_halts_through_the_board_alone() -> None:
    """No RPC, no command: the board is enough, and clearing it there lets the run be resumed."""
    run = forever()
    async with running(run):
        await run.until(lambda: run.progress.global_step > 3)
        other = await anyio.to_thread.run_sync(SignalBoard.attach, run.board.path)
        other.claim("kasmina").raise_level(EMERGENCY_LEVEL_HALT, "the seeds burn")
        await run.until(lambda: run.state == "HALTED")
        signal = other.effective()
        assert signal is not None
        await run.until(lambda: "tolaria" in other.acknowledgements(signal.signal_id))
        other.claim("operator").clear_all()
        await run.until(lambda: not run.guardian.halting)
        run.loop.resume("on")
        await run.loop.stop("enough")
        other.close()


@pytest.mark.parametrize("level", [EMERGENCY_LEVEL_NOTICE, EMERGENCY_LEVEL_ELEVATED, EMERGENCY_LEVEL_CONSERVATIVE])
async def test_lower_levels_let_training_go_on(level: EmergencyLevel.ValueType) -> None:
    """Acknowledged at once; the conservative level switches the mode, which healthy epochs end with the emergency."""
    run = forever()
    desk = SafetyDesk(run.loop, run.guardian)
    async with running(run):
        await run.loop.pause("one epoch must not end in between")
        state = await desk.raise_emergency(level, "smell")
        assert (state.level, state.phase) == (level, Phase.ANSWERED)
        assert (run.safeguards.mode.reasons == ("emergency",)) is (level == EMERGENCY_LEVEL_CONSERVATIVE)
        assert run.loop.status().emergency_level == level
        run.loop.resume("on")
        await run.until(lambda: run.guardian.controller.state.phase is Phase.CALM)
        assert not run.safeguards.mode.on
        await run.loop.stop("enough")


async def test_nonsense_changes_nothing() -> None:
    """A level that does not exist, a clearance of nothing."""
    run = forever()
    desk = SafetyDesk(run.loop, run.guardian)
    async with running(run):
        await run.until(lambda: run.state == "RUNNING")
        with pytest.raises(UnknownLevelError):
            await desk.raise_emergency(9, "what")  # type: ignore[arg-type] # on purpose
        with pytest.raises(IllegalEmergencyEventError):
            desk.clear_emergency("nothing")
        await run.loop.stop("enough")
    status = GetStatusResponse()
    run.guardian.tell(status)
    assert status.emergency_level == EMERGENCY_LEVEL_UNSPECIFIED


async def test_failed_epochs_in_a_row_halt_the_run() -> None:
    """Every boundary is a breach: the first raises ELEVATED, the breaker CONSERVATIVE, and the streak halts."""
    control = ControlSettings(boundary_budget_ms=0.01, tamiyo_budget_ms=0.01)
    run = new_run(FakePeers(), control=control, epochs=10**6)
    async with running(run):
        await run.until(lambda: run.state == "HALTED")
        assert run.progress.state_reason == "emergency: failed_epoch_streak: 3 epochs in a row"
        await run.loop.stop("enough")
    levels = [
        e.attributes["emergency_level"] for e in run.emitter.recent if e.description == "tolaria.emergency.escalated"
    ]
    assert levels == ["elevated", "conservative", "halt"]


@pytest.mark.parametrize("level", ["halt", "EMERGENCY_LEVEL_HALT", "4"])
async def test_the_controller_can_raise_one(level: str) -> None:
    """COMMAND_EMERGENCY names its level by word or number."""

    async def once(state: SystemStatePacket) -> AdaptationCommand | None:
        made = command(COMMAND_EMERGENCY)
        made.annotations["level"] = level
        return made if state.current_epoch == 1 else None

    run = forever(FakePeers(once))
    async with running(run):
        await run.until(lambda: run.state == "HALTED")
        assert run.guardian.controller.state.origin == "tamiyo"
        assert run.progress.commands_accepted == 1
        await run.loop.stop("enough")


@pytest.mark.parametrize("level", ["", "0", "unspecified", "panic"])
async def test_a_command_without_a_level_is_malformed(level: str) -> None:
    """No level, no emergency."""

    async def once(state: SystemStatePacket) -> AdaptationCommand | None:
        made = command(COMMAND_EMERGENCY)
        made.annotations["level"] = level
        return made if state.current_epoch == 1 else None

    async with running(new_run(FakePeers(once), epochs=2)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert run.metrics.registry.get_sample_value("tolaria.command.rejected_total", {"reason": "malformed"}) == 1


async def test_a_halt_outlives_the_process_until_somebody_clears_it() -> None:
    """A run that was halted when its process was told to end stands in the next; its row is closed when cleared."""
    row = EmergencyRow("e1", 7, "run", "halt", "operator", 3, "smoke")
    run = new_run(FakePeers(), epochs=10**6, standing=row)
    async with running(run):
        await run.until(lambda: run.state == "HALTED")
        assert (run.progress.state_reason, run.progress.global_step) == ("emergency: smoke", 0)
        SafetyDesk(run.loop, run.guardian).clear_emergency("no smoke")
        run.loop.resume("on")
        await run.until(lambda: run.progress.global_step > 3)
        await run.parts.archive.flush(5)
        rows = await anyio.to_thread.run_sync(run.parts.ground.storage.journal.rows, EmergencyRow)
        await run.loop.stop("enough")
    assert [(kept.emergency_id, kept.at_ns, kept.cleared_at_ns is not None) for kept in rows] == [("e1", 7, True)]


async def test_an_epoch_that_was_mended_by_going_back_is_no_failed_one() -> None:
    """Spikes that rollbacks undo do not add up to the streak of failed epochs that halts; the budget is for them."""
    options = {"spoilt": [[epoch, 3] for epoch in (3, 4, 5, 6)], "by": 1e4}
    rollback = {"every_steps": 2, "warmup_steps": 5, "fast_budget_s": 10.0, "automatic_max": 9}
    sections: dict[str, object] = {"rollback": rollback, "emergency": {"rollback": False}}
    run = new_run(FakePeers(), job="SpoiltJob", epochs=8, options=options, sections=sections)
    async with running(run):
        await run.until(lambda: run.state in {"FINISHED", "HALTED"})
    assert (run.state, run.loop.rollbacks.completed) == ("FINISHED", 4)
