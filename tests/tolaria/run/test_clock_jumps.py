"""Runs while the wall clock jumps: only the age of commands depends on it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import anyio
import pytest
import torch

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    CIRCUIT_STATE_OPEN,
    COMMAND_OPTIMIZER,
    EMERGENCY_LEVEL_ELEVATED,
    EMERGENCY_LEVEL_HALT,
    SEED_STAGE_TRAINING,
)
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import FakeTamiyo, command, serving
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.config import ControlSettings, PeerSettings
from tolaria.emergency import Phase
from tolaria.errors import PeerTimeoutError
from tolaria.peers.connect import connected_peers
from tolaria.resilience.breaker import Breaker
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio

YEAR_S = 365 * 86400.0
JUMPS_S = (10 * YEAR_S, -20 * YEAR_S, 3600.0, -86400.0)


class WallClock:
    """Replaces the wall clock by the real one plus `off_s`, which changes at every reading while `erratic`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real_ns: Callable[[], int] = time.time_ns
        self._jumps_s = itertools.cycle(JUMPS_S)
        self.off_s = 0.0
        self.erratic = False
        self.readings = 0
        monkeypatch.setattr(time, "time_ns", self.time_ns)
        monkeypatch.setattr(time, "time", lambda: self.time_ns() / 1e9)

    def time_ns(self) -> int:
        """Returns the shifted Unix time."""
        self.readings += 1
        if self.erratic:
            self.off_s = next(self._jumps_s)
        return self._real_ns() + int(self.off_s * 1e9)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    """A wall clock that the test can shift."""
    return WallClock(monkeypatch)


def patient(peers: FakePeers, *, epochs: int) -> RunUnderTest:
    """Returns a run whose boundaries wait for their answers, and which also asks at every third step."""
    control = ControlSettings(boundary_budget_ms=5000, tamiyo_budget_ms=4000, hook_budget_ms=5000, step_interval=3)
    return new_run(peers, job="SlotJob", control=control, deterministic=True, epochs=epochs)


async def trained() -> tuple[list[torch.Tensor], list[tuple[str, dict[str, str]]], list[tuple[int, int]]]:
    """Returns parameters, events and boundaries of a run of five epochs in which a seed is trained."""
    seed = SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp", slot="middle")
    peers = FakePeers(seeds=[seed])
    async with running(patient(peers, epochs=5)) as run:
        await run.until(lambda: run.state == "FINISHED")
    parameters = [p.detach().clone() for p in run.module.model.parameters()]
    events = [(event.name, dict(event.attributes)) for event in run.emitter.events]
    assert not run.safeguards.mode.on
    return parameters, [event for event in events if "ms" not in str(event)], [
        (state.current_epoch, state.global_step) for state in peers.states
    ]  # fmt: skip


async def test_an_erratic_clock_does_not_change_a_run(wall: WallClock) -> None:
    """The parameters are equal bit for bit, boundaries and events too, and no boundary is a breach."""
    expected_parameters, *expected = await trained()
    wall.erratic = True
    parameters, *found = await trained()
    assert wall.readings > 10
    assert all(torch.equal(a, b) for a, b in zip(expected_parameters, parameters, strict=True))
    assert found == expected


@pytest.mark.parametrize("jump_s", JUMPS_S)
async def test_an_open_breaker_stays_open(wall: WallClock, jump_s: float) -> None:
    """The cooldown is monotonic: no peer is called any earlier, and training goes on."""
    peers = FakePeers()
    async with running(patient(peers, epochs=10**6)) as run:
        await run.until(lambda: run.status.global_step > 3)
        run.safeguards.force("tamiyo", CIRCUIT_STATE_OPEN)
        epoch, calls = run.status.epoch, len(peers.states)
        wall.off_s = jump_s
        await run.until(lambda: run.status.epoch > epoch + 3)
        assert run.safeguards.breakers["tamiyo"].state == CIRCUIT_STATE_OPEN
        assert run.run.status().breakers["tamiyo"] == CIRCUIT_STATE_OPEN
        assert len(peers.states) == calls
        await run.run.stop("enough")


@pytest.mark.parametrize("jump_s", JUMPS_S)
async def test_emergencies_use_monotonic_time(wall: WallClock, jump_s: float) -> None:
    """No deadline is missed, latencies stay small, and a signal that the rate limit holds back still waits."""
    run = new_run(
        FakePeers(),
        epochs=10**6,
        control=ControlSettings(boundary_budget_ms=5000, tamiyo_budget_ms=4000),
        sections={"emergency": {"broadcasts_per_minute": 1, "recovery_epochs": 10**9}},
    )
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        await run.safety.raise_emergency(EMERGENCY_LEVEL_ELEVATED, "smell", run.status)
        wall.off_s = jump_s
        state = await run.safety.raise_emergency(EMERGENCY_LEVEL_HALT, "smoke", run.status)
        assert state.phase is Phase.ANSWERED
        assert all(given.latency_ns < 5e9 for given in state.acknowledgements)
        controller = run.safety.controller
        controller.pump()
        assert controller.state.phase is Phase.ANSWERED
        due_s = controller.due_in_s
        assert due_s is not None
        assert 0 < due_s <= 60
        wall.off_s = 0.0
        run.safety.clear_emergency("fine")
        step = run.status.global_step
        await run.run.resume("on")
        await run.until(lambda: run.status.global_step > step)
        await run.run.stop("enough")


@pytest.mark.parametrize("jump_s", JUMPS_S)
async def test_only_the_age_of_commands_uses_the_wall_clock(wall: WallClock, jump_s: float) -> None:
    """While the clock is wrong a valid command is stale and changes nothing; command ids are remembered throughout."""
    queued: list[AdaptationCommand] = []

    async def answer(_state: SystemStatePacket) -> AdaptationCommand | None:
        return queued.pop() if queued else None

    def rate() -> object:
        return run.module.optimizer.param_groups[0]["lr"]

    def rejected(reason: str) -> float:
        value = run.sample("tolaria.command.rejected_total", {"reason": reason})
        return value or 0.0

    run = patient(FakePeers(answer), epochs=10**6)
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        good = halving()
        wall.off_s = jump_s
        queued.append(good)
        await run.until(lambda: rejected("stale") == 1)
        assert rate() == 0.05
        wall.off_s = 0.0
        queued.append(good)
        await run.until(lambda: run.status.commands_accepted == 1)
        assert rate() == 0.025
        wall.off_s = jump_s
        queued.append(halving(good.command_id))  # with a new date from the wrong clock; only the id shows the replay
        await run.until(lambda: rejected("replayed") == 1)
        assert rate() == 0.025
        await run.run.stop("enough")


def halving(command_id: str = "") -> AdaptationCommand:
    """Returns a command that halves the learning rate, with the present time."""
    made = command(COMMAND_OPTIMIZER)
    made.command_id = command_id or made.command_id
    made.optimizer_adjustment.hyperparameters["lr_factor"] = 0.5
    return made


@pytest.mark.parametrize("jump_s", JUMPS_S)
async def test_a_jump_during_a_call_does_not_change_its_deadline(wall: WallClock, jump_s: float) -> None:
    """An answer is still accepted; a call without one times out after its deadline."""
    wait = anyio.Event()

    async def jumping(state: SystemStatePacket) -> AdaptationCommand | None:
        wall.off_s = jump_s
        if state.current_epoch == 2:
            await wait.wait()
        return None

    breakers = {name: Breaker(name, clock=time.monotonic) for name in ("tamiyo", "kasmina")}
    async with serving(FakeTamiyo(jumping)) as target:
        settings = PeerSettings(target=target, timeout_s=0.5)
        async with connected_peers(
            settings, settings, breakers=breakers, metrics=Metrics(), emitter=Emitter()
        ) as peers:
            assert await peers.tamiyo.evaluate_epoch(SystemStatePacket(current_epoch=1)) is None
            wall.off_s = 0.0
            began_s = time.monotonic()
            with pytest.raises(PeerTimeoutError):
                await peers.tamiyo.evaluate_epoch(SystemStatePacket(current_epoch=2))
            assert 0.4 < time.monotonic() - began_s < 5.0
            wall.off_s = 0.0
