from __future__ import annotations

from dataclasses import replace
from typing import cast

import anyio
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_PAUSE, COMMAND_SEED, EMERGENCY_LEVEL_ELEVATED, SEED_STAGE_TRAINING, CommandType
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import command
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.config import ControlSettings
from tolaria.training.cadence import StepCadence
from tolaria.training.consult import Consultant
from tolaria.training.progress import Progress
from tolaria.training.reports import StepReport

pytestmark = pytest.mark.anyio


def asking_every(interval: int, peers: FakePeers, *, job: str = "TinyJob", epochs: int = 10**6) -> RunUnderTest:
    """A run that asks between epochs, and of which nothing is a breach."""
    control = ControlSettings(
        boundary_budget_ms=5000, tamiyo_budget_ms=4000, hook_budget_ms=5000, step_interval=interval
    )
    return new_run(peers, job=job, epochs=epochs, control=control)


async def test_by_default_the_controller_is_asked_at_boundaries_only() -> None:
    """The cadence is off unless somebody wants it."""
    peers = FakePeers()
    async with running(asking_every(0, peers, epochs=3)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert peers.step_states == []


async def test_it_is_asked_about_every_so_many_steps() -> None:
    """Only at multiples of the interval, with the step's own loss, and never to Kasmina."""
    peers = FakePeers()
    async with running(asking_every(3, peers)) as run:
        await run.until(lambda: len(peers.step_states) > 5)
        await run.loop.stop("enough")
    steps = [state.global_step for state in peers.step_states]
    assert all(step % 3 == 0 for step in steps)
    assert steps == sorted(set(steps))
    assert all(state.training_loss > 0 for state in peers.step_states)
    assert run.progress.refusals == ()


async def test_one_question_at_a_time_and_the_newest_state_next() -> None:
    """While an answer is out, training goes on; what is asked next is about the newest step, not the one after."""
    release = anyio.Event()

    async def slow(_state: SystemStatePacket) -> AdaptationCommand | None:
        await release.wait()
        return None

    peers = FakePeers(slow)
    run = new_run(peers, epochs=10**6, options={"samples": 8 * 10**5}, control=ControlSettings(step_interval=1))
    async with running(run):
        await run.until(lambda: run.progress.global_step > 50)
        assert len(peers.step_states) == 1
        newest = run.progress.global_step
        release.set()
        await run.until(lambda: len(peers.step_states) > 1)
        assert peers.step_states[1].global_step >= newest
        await run.loop.stop("enough")


@pytest.mark.parametrize("kind", [COMMAND_PAUSE, COMMAND_SEED])
async def test_an_answer_between_epochs_takes_effect(kind: CommandType.ValueType) -> None:
    """A pause holds the run; a seed command goes to Kasmina, and what she desires then grows."""
    asked = [command(kind)]

    async def once(_state: SystemStatePacket) -> AdaptationCommand | None:
        return asked.pop() if asked else None

    seed = SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp")
    peers = FakePeers(once, [seed])
    run = asking_every(2, peers, job="SlotJob")  # an epoch has eight: the first question comes between epochs
    async with running(run):
        await run.until(lambda: run.progress.commands_accepted >= 1)
        if kind == COMMAND_PAUSE:
            await run.until(lambda: run.state == "PAUSED")
        else:
            await run.until(lambda: [s.slot for s in run.loop.status().seeds] == ["middle"])
            assert len(peers.applied) == 1
        await run.loop.stop("enough")


class Ear:
    """Stands where the consultant does, and takes so many seconds of `now_s` to hear a question."""

    def __init__(self) -> None:
        self.now_s, self.takes_s = 100.0, 0.0
        self.heard: list[int] = []

    def ask_between_epochs(self, state: SystemStatePacket) -> None:
        self.now_s += self.takes_s
        self.heard.append(state.global_step)


def test_the_time_of_every_question_is_told() -> None:
    """In milliseconds, with the step's number; steps that nobody is asked about, and void ones, cost nothing."""
    ear, told = Ear(), list[tuple[int, float]]()
    cadence = StepCadence(
        cast("Consultant", ear),
        Progress("run", "job", "test", epochs=1, steps_per_epoch=8, started_at_s=0.0),
        interval=2,
        on_hook=lambda step, latency_ms: told.append((step, latency_ms)),
        clock=lambda: ear.now_s,
    )
    step = StepReport(1, 1, 0.5, 1.0, samples=8, duration_s=0.01, input_wait_s=0.0, finished_at_s=0.0)
    for number, takes_s in [(1, 1.0), (2, 0.25), (3, 1.0), (4, 0.5)]:
        ear.takes_s = takes_s
        cadence.step(replace(step, global_step=number))
    cadence.step(replace(step, global_step=6, void=True))
    assert ear.heard == [2, 4]
    assert told == [(2, 250.0), (4, 500.0)]


async def test_a_question_over_its_budget_is_told_and_raises_an_emergency() -> None:
    """The gauge shows its time, the event names step and budget, and the level is ELEVATED: training goes on."""
    control = ControlSettings(boundary_budget_ms=5000, tamiyo_budget_ms=4000, hook_budget_ms=1e-6, step_interval=2)
    run = new_run(FakePeers(), epochs=10**6, control=control)
    async with running(run):
        await run.until(lambda: run.progress.global_step > 8)
        state = run.guardian.controller.state
        assert (state.level, state.reason) == (EMERGENCY_LEVEL_ELEVATED, "hook_breach: over budget")
        assert run.state == "RUNNING"
        assert not run.safeguards.mode.on
        await run.loop.stop("enough")
    told = [e.attributes for e in run.emitter.events if e.name == "tolaria.hook_budget_exceeded"]
    assert [int(attributes["step"]) for attributes in told[:3]] == [2, 4, 6]
    assert told[0]["budget_ms"] == "1e-06"
    assert float(told[0]["latency_ms"]) > 0
    assert (run.metrics.registry.get_sample_value("tolaria.hook.latency_ms") or 0) > 0


async def test_questions_within_their_budget_are_no_breach() -> None:
    """Their time is shown, and that is all."""
    async with running(asking_every(2, FakePeers(), epochs=3)) as run:
        await run.until(lambda: run.state == "FINISHED")
    assert (run.metrics.registry.get_sample_value("tolaria.hook.latency_ms") or 0) > 0
    assert "tolaria.hook_budget_exceeded" not in run.events
    assert not run.guardian.controller.state.level
