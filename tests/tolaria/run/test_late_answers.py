from __future__ import annotations

import anyio
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    COMMAND_EMERGENCY,
    COMMAND_OPTIMIZER,
    COMMAND_PAUSE,
    COMMAND_SEED,
    ROLLBACK_TIER_FAST,
    CommandType,
)
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import command
from support.runs import FakePeers, new_run, running
from tolaria.config import ControlSettings
from tolaria.rollback.protocol import Rollback

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("kind", [COMMAND_PAUSE, COMMAND_OPTIMIZER, COMMAND_EMERGENCY, COMMAND_SEED])
@pytest.mark.parametrize("behind", [0, 1])
async def test_a_command_about_an_older_state_is_rejected_as_late(kind: CommandType.ValueType, behind: int) -> None:
    """A valid command about a step that training has left is counted, an event, and without effect."""

    async def once(state: SystemStatePacket) -> AdaptationCommand | None:
        made = command(kind)
        made.annotations["level"] = "notice"
        if kind == COMMAND_OPTIMIZER:
            made.optimizer_adjustment.hyperparameters["lr_factor"] = 0.5
        return made if state.packet_id == "asked" else None

    control = ControlSettings(boundary_budget_ms=5000, tamiyo_budget_ms=4000, max_staleness_steps=0)
    run = new_run(FakePeers(once), job="WithoutValidationJob", epochs=10**6, control=control)
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        await run.run.pause("look")
        await anyio.wait_all_tasks_blocked()
        state = SystemStatePacket(packet_id="asked", current_epoch=1, global_step=run.status.global_step - behind)
        consultation = run.consultations.ask(state)
        await consultation.settled.wait()
        await run.until(lambda: run.status.commands_accepted + run.status.commands_rejected == 1)
        await run.run.stop("enough")
    late = run.sample("tolaria.command.rejected_total", {"reason": "late"}) or 0.0
    assert (late, run.status.commands_rejected, run.events.count("command_rejected")) == (behind,) * 3
    assert run.status.commands_accepted == 1 - behind


async def test_an_answer_from_before_a_rollback_is_stale_whatever_its_step() -> None:
    """Asked before a rollback, answered after it: rejected as late, though training is past that step again."""
    answering = anyio.Event()
    asked: list[int] = []

    async def slow(state: SystemStatePacket) -> AdaptationCommand | None:
        if state.packet_id != "asked":
            return None
        asked.append(state.global_step)
        await answering.wait()
        made = command(COMMAND_OPTIMIZER)
        made.optimizer_adjustment.hyperparameters["lr_factor"] = 0.5
        return made

    sections: dict[str, object] = {"rollback": {"automatic": False, "every_steps": 1, "fast_budget_s": 20}}
    run = new_run(FakePeers(slow), job="WithoutValidationJob", epochs=10**6, sections=sections)
    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        await run.run.pause("look")
        await anyio.wait_all_tasks_blocked()
        state = SystemStatePacket(packet_id="asked", current_epoch=1, global_step=run.status.global_step)
        consultation = run.consultations.ask(state)
        await run.until(lambda: bool(asked))
        target = min(point.position.global_step for point in run.status.snapshots)
        await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, target, "odd", "operator"))
        await run.run.resume("on")
        await run.until(lambda: run.status.global_step > asked[0])
        answering.set()
        await consultation.settled.wait()
        assert run.sample("tolaria.command.rejected_total", {"reason": "late"}) == 1
        assert run.emitter.attributes_of("command_rejected")[0]["detail"] == "a rollback has undone its state"
        await run.run.stop("enough")
    assert (run.status.commands_accepted, run.status.learning_rates) == (0, {"host": 0.05})


async def test_a_question_that_waits_when_the_run_is_rolled_back_is_not_asked() -> None:
    """It is settled without an answer, so that nothing waits for it."""
    peers = FakePeers()
    run = new_run(peers, job="WithoutValidationJob", epochs=10**6)
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        await run.run.pause("look")
        await anyio.wait_all_tasks_blocked()
        count = len(peers.states)
        consultation = run.consultations.ask(SystemStatePacket(packet_id="asked"))
        run.consultations.rewound()
        await consultation.settled.wait()
        assert (consultation.outdated, len(peers.states)) == (True, count)
        await run.run.stop("enough")
