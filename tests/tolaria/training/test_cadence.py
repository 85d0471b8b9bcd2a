from __future__ import annotations

import anyio
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_PAUSE, COMMAND_SEED, SEED_STAGE_TRAINING, CommandType
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import command
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.config import ControlSettings

pytestmark = pytest.mark.anyio


def asking_every(interval: int, peers: FakePeers, *, job: str = "TinyJob", epochs: int = 10**6) -> RunUnderTest:
    """A run that asks between epochs, and whose boundaries are no breach."""
    control = ControlSettings(boundary_budget_ms=5000, tamiyo_budget_ms=4000, step_interval=interval)
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
