from __future__ import annotations

from collections.abc import Sequence

import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    CIRCUIT_STATE_CLOSED,
    CIRCUIT_STATE_HALF_OPEN,
    CIRCUIT_STATE_OPEN,
    COMMAND_CIRCUIT_BREAKER,
    COMMAND_SEED,
    SEED_STAGE_TRAINING,
    CircuitBreakerState,
)
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import command
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.config import ControlSettings
from tolaria.errors import PeerTimeoutError

pytestmark = pytest.mark.anyio


def breaker_command(name: str, state: CircuitBreakerState.ValueType) -> AdaptationCommand:
    """Returns a COMMAND_CIRCUIT_BREAKER for this breaker."""
    made = command(COMMAND_CIRCUIT_BREAKER)
    made.circuit_breaker.desired_state = state
    made.annotations["breaker"] = name
    return made


def generous() -> ControlSettings:
    """Returns budgets that no boundary of a test exceeds."""
    return ControlSettings(boundary_budget_ms=5000, tamiyo_budget_ms=4000)


async def finished(peers: FakePeers, *, epochs: int) -> RunUnderTest:
    """Returns a finished run with these peers."""
    async with running(new_run(peers, epochs=epochs, job="SlotJob", control=generous())) as run:
        await run.until(lambda: run.state == "FINISHED")
    return run


async def test_the_mode_suspends_peers_and_seeds_while_training_goes_on() -> None:
    """No peer is called and no seed grows, but every epoch is trained; switched off, both are back."""
    peers = FakePeers(seeds=[SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp")])
    run = new_run(peers, job="SlotJob", epochs=10**6, control=generous())
    assert run.safety.set_conservative(enabled=True) == ("operator",)
    async with running(run):
        await run.until(lambda: len(run.status.boundaries_ms) >= 3)
        assert peers.states == []
        assert run.run.status().tamiyo_answer == "not asked (conservative mode)"
        assert list(run.run.status().conservative_reasons) == ["operator"]
        assert list(run.run.status().seeds) == []
        assert run.safety.set_conservative(enabled=False) == ()
        await run.until(lambda: [s.slot for s in run.run.status().seeds] == ["middle"])
        await run.run.stop("enough")
    assert peers.states
    assert run.events.count("tolaria.conservative_mode_entered") == 1
    assert run.events.count("tolaria.conservative_mode_cleared") == 1


async def test_a_failure_of_a_peer_turns_the_mode_on() -> None:
    """Tamiyo fails once: the mode is on for as many healthy epochs as recovery takes. No epoch has failed."""

    async def fail_once(state: SystemStatePacket) -> AdaptationCommand | None:
        if state.current_epoch == 1:
            raise PeerTimeoutError("tamiyo", "late")
        return None

    peers = FakePeers(fail_once)
    run = await finished(peers, epochs=8)
    # The failure belongs to epoch 1; epochs 2, 3 and 4 are the healthy ones.
    assert [state.current_epoch for state in peers.states] == [1, 5, 6, 7, 8]
    assert run.sample("tolaria.epochs.failed") == 0
    assert not run.safeguards.mode.on


async def test_a_command_opens_the_breaker_that_it_names() -> None:
    """The status shows the breaker, the mode follows, and the command counts as applied."""

    async def open_kasminas(_state: SystemStatePacket) -> AdaptationCommand | None:
        return breaker_command("kasmina", CIRCUIT_STATE_OPEN)

    run = await finished(FakePeers(open_kasminas), epochs=3)
    status = run.run.status()
    assert status.breakers["kasmina"] == CIRCUIT_STATE_OPEN
    assert status.breakers["tamiyo"] == CIRCUIT_STATE_CLOSED
    assert list(status.conservative_reasons) == ["breaker_open:kasmina"]
    assert status.commands_accepted == 1


@pytest.mark.parametrize(
    ("name", "desired"),
    [("unknown", CIRCUIT_STATE_OPEN), ("", CIRCUIT_STATE_OPEN), ("tamiyo", CIRCUIT_STATE_HALF_OPEN)],
)
async def test_an_invalid_breaker_command_is_malformed(name: str, desired: CircuitBreakerState.ValueType) -> None:
    """An unknown name, or a state that cannot be commanded: rejected, and every breaker stays closed."""

    async def once(state: SystemStatePacket) -> AdaptationCommand | None:
        return breaker_command(name, desired) if state.current_epoch == 1 else None

    run = await finished(FakePeers(once), epochs=2)
    assert run.sample("tolaria.command.rejected_total", {"reason": "malformed"}) == 1
    assert set(run.run.status().breakers.values()) == {CIRCUIT_STATE_CLOSED}


async def test_an_answer_that_arrives_in_the_mode_changes_no_seed() -> None:
    """The mode begins while Kasmina is answering: neither her desired seeds nor the command take effect."""
    seed = SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp")

    async def germinate(_state: SystemStatePacket) -> AdaptationCommand | None:
        return command(COMMAND_SEED)

    class Overtaken(FakePeers):
        async def export_seeds(
            self, state: SystemStatePacket, refusals: Sequence[tuple[str, str]] = ()
        ) -> list[SeedState]:
            run.safeguards.mode.force_on()
            return await super().export_seeds(state, refusals)

    run = new_run(Overtaken(germinate, [seed]), epochs=3, job="SlotJob", control=generous())
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
    assert list(run.run.status().seeds) == []
    assert run.status.commands_accepted == 0
    assert run.sample("tolaria.command.rejected_total", {"reason": "conservative"}) == 1
