from __future__ import annotations

import math
from dataclasses import replace

import pytest

from leyline.v1 import enums_pb2 as e
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.reference.gates import GateFacts, LifecycleSettings, alpha_at, loss_of, obstacle
from tolaria.reference.lifecycle import Gate

SETTINGS = LifecycleSettings()
FACTS = GateFacts(
    state=SystemStatePacket(version=1, current_epoch=9, global_step=300, validation_accuracy=0.9),
    reported=SeedState(seed_id="s", gradient_norm=0.5),
    blueprint_id="lora",
    slot_free=True,
    epochs_in_stage=3,
    losses=(1.0, 0.9),
    alpha=AlphaSchedule(start=0.0, end=1.0, begin_step=100, duration_steps=200),
    accuracy_before=0.9,
)


def reported(norm: float) -> GateFacts:
    """Facts with this gradient norm of the seed."""
    return replace(FACTS, reported=SeedState(seed_id="s", gradient_norm=norm))


def measured(accuracy: float, before: float | None) -> GateFacts:
    """Facts with these validation accuracies."""
    return replace(FACTS, state=SystemStatePacket(validation_accuracy=accuracy), accuracy_before=before)


@pytest.mark.parametrize("gate", [gate for gate in e.SeedLifecycleGate.values() if gate != e.SEED_GATE_UNKNOWN])
def test_open(gate: Gate) -> None:
    """Every gate of the contract is open for a healthy seed."""
    assert obstacle(gate, FACTS, SETTINGS) is None


def test_no_gate() -> None:
    """A move without a gate is never held up."""
    assert obstacle(None, FACTS, SETTINGS) is None


@pytest.mark.parametrize(
    ("gate", "facts", "why"),
    [
        (e.SEED_GATE_G0_SANITY, replace(FACTS, blueprint_id="nosuch"), "blueprint 'nosuch' is unknown"),
        (e.SEED_GATE_G0_SANITY, replace(FACTS, slot_free=False), "slot is taken"),
        (e.SEED_GATE_G1_GRADIENT_HEALTH, replace(FACTS, reported=None), "no gradient norm"),
        (e.SEED_GATE_G1_GRADIENT_HEALTH, reported(math.nan), "is nan"),
        (e.SEED_GATE_G1_GRADIENT_HEALTH, reported(math.inf), "is inf"),
        (e.SEED_GATE_G1_GRADIENT_HEALTH, reported(0.0), "vanished"),
        (e.SEED_GATE_G2_STABILITY, replace(FACTS, losses=(1.0,)), "1 of 2 epochs"),
        (e.SEED_GATE_G2_STABILITY, replace(FACTS, losses=(1.0, math.nan)), "not finite"),
        (e.SEED_GATE_G2_STABILITY, replace(FACTS, losses=(1.0, 1.2)), "rises"),
        (e.SEED_GATE_G2_STABILITY, replace(FACTS, losses=(-1.0, -0.8)), "rises"),
        (e.SEED_GATE_G3_INTERFACE, replace(FACTS, alpha=None), "no alpha"),
        (e.SEED_GATE_G3_INTERFACE, replace(FACTS, state=SystemStatePacket(global_step=299)), "end at step 300"),
        (e.SEED_GATE_G4_SYSTEM_IMPACT, replace(FACTS, epochs_in_stage=2), "2 of 3 epochs"),
        (e.SEED_GATE_G4_SYSTEM_IMPACT, measured(0.88, 0.9), "fell from 0.9000 to 0.8800"),
        (e.SEED_GATE_G4_SYSTEM_IMPACT, measured(math.nan, 0.9), "not known"),
        (e.SEED_GATE_G4_SYSTEM_IMPACT, measured(0.9, None), "not known"),
        (e.SEED_GATE_G5_RESET, replace(FACTS, epochs_in_stage=1), "1 epochs of embargo left"),
    ],
)
def test_shut(gate: Gate, facts: GateFacts, why: str) -> None:
    """A gate that stays shut says why, in words."""
    assert why in (obstacle(gate, facts, SETTINGS) or "")


def test_small_losses_of_accuracy_and_small_rises_pass() -> None:
    """Noise within the tolerances shuts no gate, and a falling loss is as good as a still one."""
    assert obstacle(e.SEED_GATE_G4_SYSTEM_IMPACT, measured(0.895, 0.9), SETTINGS) is None
    assert obstacle(e.SEED_GATE_G2_STABILITY, replace(FACTS, losses=(1.0, 1.05)), SETTINGS) is None
    assert obstacle(e.SEED_GATE_G2_STABILITY, replace(FACTS, losses=(-1.0, -0.95)), SETTINGS) is None
    assert obstacle(e.SEED_GATE_G2_STABILITY, replace(FACTS, losses=(1.0, 0.1)), SETTINGS) is None


@pytest.mark.parametrize(("step", "alpha"), [(0, 0.2), (100, 0.2), (150, 0.5), (200, 0.8), (10**9, 0.8)])
def test_alpha_is_linear_between_its_ends(step: int, alpha: float) -> None:
    """Alpha follows the contract: linear within the schedule, constant outside."""
    schedule = AlphaSchedule(start=0.2, end=0.8, begin_step=100, duration_steps=100)
    assert alpha_at(schedule, step) == pytest.approx(alpha)


def test_alpha_without_duration_is_at_its_end() -> None:
    """A schedule of no steps jumps to its end and divides nothing by zero."""
    assert alpha_at(AlphaSchedule(start=0.0, end=1.0, begin_step=5), 5) == 1.0
    assert alpha_at(AlphaSchedule(start=0.0, end=1.0, begin_step=5), 4) == 0.0


def test_loss_of_the_seed_comes_before_the_host() -> None:
    """A seed's own loss is judged where it is reported, else the host's."""
    state = SystemStatePacket(validation_loss=2.0)
    assert loss_of(SeedState(metrics={"loss": 0.5}), state) == 0.5
    assert loss_of(SeedState(), state) == 2.0
    assert loss_of(None, state) == 2.0
