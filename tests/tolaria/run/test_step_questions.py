from __future__ import annotations

from dataclasses import replace
from typing import cast

import anyio
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_PAUSE, COMMAND_SEED, EMERGENCY_LEVEL_NOTICE, SEED_STAGE_TRAINING, CommandType
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import command
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.config import ControlSettings
from tolaria.lane.messages import StepDone
from tolaria.peers.consultation import Consultations
from tolaria.run.boundary import StepQuestions

pytestmark = pytest.mark.anyio


def asking_every(interval: int, peers: FakePeers, *, job: str = "TinyJob", epochs: int = 10**6) -> RunUnderTest:
    """Returns a run that asks between epochs, within its budgets."""
    control = ControlSettings(
        boundary_budget_ms=5000, tamiyo_budget_ms=4000, hook_budget_ms=5000, step_interval=interval
    )
    return new_run(peers, job=job, epochs=epochs, control=control)


async def test_by_default_the_controller_is_asked_at_boundaries_only() -> None:
    """Questions between epochs are off by default."""
    peers = FakePeers()
    async with running(asking_every(0, peers, epochs=3)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert peers.step_states == []


async def test_the_controller_is_asked_at_the_interval() -> None:
    """Only at multiples of the interval, with the step's own loss, and never to Kasmina."""
    peers = FakePeers()
    async with running(asking_every(3, peers)) as run:
        await run.until(lambda: len(peers.step_states) > 5)
        await run.run.stop("enough")
    steps = [state.global_step for state in peers.step_states]
    assert all(step % 3 == 0 for step in steps)
    assert steps == sorted(set(steps))
    assert all(state.training_loss > 0 for state in peers.step_states)
    assert run.status.refusals == ()


async def test_one_question_at_a_time_and_the_newest_state_next() -> None:
    """While an answer is out, training goes on; what is asked next is about the newest step, not the one after."""
    release = anyio.Event()

    async def slow(_state: SystemStatePacket) -> AdaptationCommand | None:
        await release.wait()
        return None

    peers = FakePeers(slow)
    run = new_run(peers, epochs=10**6, options={"samples": 8 * 10**5}, control=ControlSettings(step_interval=1))
    async with running(run):
        await run.until(lambda: run.status.global_step > 50)
        assert len(peers.step_states) == 1
        newest = run.status.global_step
        release.set()
        await run.until(lambda: len(peers.step_states) > 1)
        assert peers.step_states[1].global_step >= newest
        await run.run.stop("enough")


@pytest.mark.parametrize("kind", [COMMAND_PAUSE, COMMAND_SEED])
async def test_an_answer_between_epochs_takes_effect(kind: CommandType.ValueType) -> None:
    """A pause holds the run; a seed command goes to Kasmina, and the seed that it desires grows."""
    asked = [command(kind)]

    async def once(_state: SystemStatePacket) -> AdaptationCommand | None:
        return asked.pop() if asked else None

    seed = SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp")
    peers = FakePeers(once, [seed])
    run = asking_every(2, peers, job="SlotJob")  # an epoch has eight: the first question comes between epochs
    async with running(run):
        await run.until(lambda: run.status.commands_accepted >= 1)
        if kind == COMMAND_PAUSE:
            await run.until(lambda: run.state == "PAUSED")
        else:
            await run.until(lambda: [s.slot for s in run.run.status().seeds] == ["middle"])
            assert len(peers.applied) == 1
        await run.run.stop("enough")


class SlowConsultations:
    """Consultations that take `takes_s` of the test's clock to accept a question."""

    def __init__(self, questions: Consultations) -> None:
        self.now_s, self.takes_s = 100.0, 0.0
        self.questions = questions
        self.asked: list[int] = []

    def ask_between_epochs(self, state: SystemStatePacket) -> None:
        self.now_s += self.takes_s
        self.asked.append(state.global_step)
        self.questions.ask_between_epochs(state)


async def test_the_time_of_every_question_is_recorded() -> None:
    """In milliseconds, with the step's number; steps between two questions, and skipped ones, cost nothing."""
    run = new_run(FakePeers())
    async with running(run):
        await run.run.pause("only the questions of this test")
        slow = SlowConsultations(run.consultations)
        questions = StepQuestions(
            cast("Consultations", slow),
            ControlSettings(step_interval=2, hook_budget_ms=300),
            status=run.status,
            health=run.health,
            observers=run.core.observers,
            safety=run.safety,
            clock=lambda: slow.now_s,
        )
        step = StepDone(1, 1, 0.5, 1.0, samples=8, duration_s=0.01, input_wait_s=0.0, finished_at_s=0.0)
        latencies = []
        for number, takes_s in [(1, 1.0), (2, 0.25), (3, 1.0), (4, 0.5)]:
            slow.takes_s = takes_s
            questions.step(replace(step, global_step=number))
            latencies.append(run.sample("tolaria.hook.latency_ms"))
        questions.step(replace(step, global_step=6, skipped=True))
        await run.run.stop("enough")
    assert slow.asked == [2, 4]
    assert latencies == [0, 250, 250, 500]
    assert [attributes["step"] for attributes in run.emitter.attributes_of("tolaria.hook_budget_exceeded")] == ["4"]


async def test_a_question_over_its_budget_is_an_event_and_raises_an_emergency() -> None:
    """The gauge shows its time, the event names step and budget, and the level is NOTICE: training goes on."""
    control = ControlSettings(boundary_budget_ms=5000, tamiyo_budget_ms=4000, hook_budget_ms=1e-6, step_interval=2)
    run = new_run(FakePeers(), epochs=10**6, control=control)
    async with running(run):
        await run.until(lambda: run.status.global_step > 8)
        state = run.safety.controller.state
        assert (state.level, state.reason) == (EMERGENCY_LEVEL_NOTICE, "hook_breach: over budget")
        assert run.state == "RUNNING"
        assert not run.safeguards.mode.on
        await run.run.stop("enough")
    breaches = run.emitter.attributes_of("tolaria.hook_budget_exceeded")
    assert [int(attributes["step"]) for attributes in breaches[:3]] == [2, 4, 6]
    assert breaches[0]["budget_ms"] == "1e-06"
    assert float(breaches[0]["latency_ms"]) > 0
    assert (run.sample("tolaria.hook.latency_ms") or 0) > 0


async def test_questions_within_their_budget_are_no_breach() -> None:
    """Their time is shown; there is no event and no emergency."""
    async with running(asking_every(2, FakePeers(), epochs=3)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert (run.sample("tolaria.hook.latency_ms") or 0) > 0
    assert "tolaria.hook_budget_exceeded" not in run.events
    assert not run.safety.controller.state.level
