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
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.metrics import Metrics
from tolaria.training.safety_desk import SafetyDesk

pytestmark = pytest.mark.anyio

YEAR_S = 365 * 86400.0
JUMPS_S = (10 * YEAR_S, -20 * YEAR_S, 3600.0, -86400.0)


class WallClock:
    """Stands in for the wall clock: the real one and `off_s`, which moves at every look where `wild`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real_ns: Callable[[], int] = time.time_ns
        self._jumps_s = itertools.cycle(JUMPS_S)
        self.off_s = 0.0
        self.wild = False
        self.looks = 0
        monkeypatch.setattr(time, "time_ns", self.time_ns)
        monkeypatch.setattr(time, "time", lambda: self.time_ns() / 1e9)

    def time_ns(self) -> int:
        """Unix time as it seems."""
        self.looks += 1
        if self.wild:
            self.off_s = next(self._jumps_s)
        return self._real_ns() + int(self.off_s * 1e9)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    """A wall clock that a test can set."""
    return WallClock(monkeypatch)


def patient(peers: FakePeers, *, epochs: int) -> RunUnderTest:
    """A run whose boundaries wait for their answers, and which asks every third step too."""
    control = ControlSettings(boundary_budget_ms=5000, tamiyo_budget_ms=4000, hook_budget_ms=5000, step_interval=3)
    return new_run(peers, job="SlotJob", control=control, deterministic=True, epochs=epochs)


async def trained() -> tuple[list[torch.Tensor], list[tuple[str, dict[str, str]]], list[tuple[int, int]]]:
    """Parameters, events and boundaries of a run of five epochs in which a seed is trained."""
    seed = SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp", slot="middle")
    peers = FakePeers(seeds=[seed])
    async with running(patient(peers, epochs=5)) as run:
        await run.until(lambda: run.state == "FINISHED")
    parameters = [p.detach().clone() for p in run.rig.model.parameters()]
    events = [(event.description, dict(event.attributes)) for event in run.emitter.recent]
    assert not run.safeguards.mode.on
    return parameters, [event for event in events if "ms" not in str(event)], [
        (state.current_epoch, state.global_step) for state in peers.states
    ]  # fmt: skip


async def test_a_run_under_a_wild_clock_is_the_run_under_a_good_one(wall: WallClock) -> None:
    """Bit for bit, at the same boundaries, with the same events and no breach."""
    good_parameters, *good = await trained()
    wall.wild = True
    wild_parameters, *wild = await trained()
    assert wall.looks > 10
    assert all(torch.equal(a, b) for a, b in zip(good_parameters, wild_parameters, strict=True))
    assert wild == good


@pytest.mark.parametrize("jump_s", JUMPS_S)
async def test_an_open_breaker_stays_open(wall: WallClock, jump_s: float) -> None:
    """Its thirty seconds are not the wall's: nobody is asked any earlier, and training goes on."""
    peers = FakePeers()
    async with running(patient(peers, epochs=10**6)) as run:
        await run.until(lambda: run.progress.global_step > 3)
        run.safeguards.force("tamiyo", CIRCUIT_STATE_OPEN)
        await run.until(lambda: run.loop.consultant._waiting is None)
        epoch, asked = run.progress.epoch, len(peers.states) + 1  # one may be on its way
        wall.off_s = jump_s
        await run.until(lambda: run.progress.epoch > epoch + 3)
        assert run.safeguards.breakers["tamiyo"].state == CIRCUIT_STATE_OPEN
        assert run.loop.status().breakers["tamiyo"] == CIRCUIT_STATE_OPEN
        assert len(peers.states) <= asked
        await run.loop.stop("enough")


@pytest.mark.parametrize("jump_s", JUMPS_S)
async def test_emergencies_keep_their_times(wall: WallClock, jump_s: float) -> None:
    """No deadline is missed, no acknowledgement takes years, and what the rate cap holds back still waits."""
    run = new_run(
        FakePeers(),
        epochs=10**6,
        control=ControlSettings(boundary_budget_ms=5000, tamiyo_budget_ms=4000),
        sections={"emergency": {"broadcasts_per_minute": 1, "recovery_epochs": 10**9}},
    )
    desk = SafetyDesk(run.loop, run.guardian)
    async with running(run):
        await run.until(lambda: run.progress.global_step > 3)
        await desk.raise_emergency(EMERGENCY_LEVEL_ELEVATED, "smell")
        wall.off_s = jump_s
        state = await desk.raise_emergency(EMERGENCY_LEVEL_HALT, "smoke")
        assert state.phase is Phase.ANSWERED
        assert all(given.latency_ns < 5e9 for given in state.acknowledgements)
        controller = run.guardian.controller
        controller.pump()
        assert controller.signals_waiting == 1
        assert controller.state.phase is Phase.ANSWERED
        due_s = controller.due_in_s
        assert due_s is not None
        assert 0 < due_s <= 60
        wall.off_s = 0.0
        desk.clear_emergency("fine")
        step = run.progress.global_step
        run.loop.resume("on")
        await run.until(lambda: run.progress.global_step > step)
        await run.loop.stop("enough")


@pytest.mark.parametrize("jump_s", JUMPS_S)
async def test_freshness_alone_follows_the_wall(wall: WallClock, jump_s: float) -> None:
    """While the clock is wrong a good command is stale and changes nothing; the memory of ids outlasts it all."""
    sent: list[AdaptationCommand] = []

    async def answer(_state: SystemStatePacket) -> AdaptationCommand | None:
        return sent.pop() if sent else None

    def rate() -> object:
        return run.rig.optimizer.param_groups[0]["lr"]

    def rejected(reason: str) -> float:
        value = run.metrics.registry.get_sample_value("tolaria.command.rejected_total", {"reason": reason})
        return value or 0.0

    run = patient(FakePeers(answer), epochs=10**6)
    async with running(run):
        await run.until(lambda: run.progress.global_step > 3)
        good = halving()
        wall.off_s = jump_s
        sent.append(good)
        await run.until(lambda: rejected("stale") == 1)
        assert rate() == 0.05
        wall.off_s = 0.0
        sent.append(good)
        await run.until(lambda: run.progress.commands_accepted == 1)
        assert rate() == 0.025
        wall.off_s = jump_s
        sent.append(halving(good.command_id))  # dated anew by the wrong clock: only its id tells
        await run.until(lambda: rejected("replayed") == 1)
        assert rate() == 0.025
        await run.loop.stop("enough")


def halving(command_id: str = "") -> AdaptationCommand:
    """A command that halves the learning rate, dated now."""
    made = command(COMMAND_OPTIMIZER)
    made.command_id = command_id or made.command_id
    made.optimizer_adjustment.hyperparameters["lr_factor"] = 0.5
    return made


@pytest.mark.parametrize("jump_s", JUMPS_S)
async def test_a_jump_in_the_middle_of_a_call_neither_ends_nor_lengthens_it(wall: WallClock, jump_s: float) -> None:
    """The answer still counts; where none comes, the deadline holds."""
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
