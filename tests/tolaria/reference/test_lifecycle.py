from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest

from leyline.v1 import enums_pb2 as e
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.errors import IllegalMoveError
from tolaria.reference.lifecycle import (
    AUTOMATIC,
    OPERATIONS,
    TRANSITIONS,
    Gate,
    Observation,
    Operation,
    Seed,
    closed_reason,
    loss_of,
    operation_name,
    stage_name,
    target_of,
)
from tolaria.values.seeds import GROWING, Stage

STAGES = e.SeedLifecycleStage.values()
OPERATION_VALUES = e.SeedOperation.values()

# Written out independently of the tables under test.
LEGAL_TRANSITIONS: dict[tuple[Stage, Stage], Gate | None] = {
    (e.SEED_STAGE_DORMANT, e.SEED_STAGE_GERMINATED): e.SEED_GATE_G0_SANITY,
    (e.SEED_STAGE_GERMINATED, e.SEED_STAGE_TRAINING): None,
    (e.SEED_STAGE_TRAINING, e.SEED_STAGE_BLENDING): e.SEED_GATE_G1_GRADIENT_HEALTH,
    (e.SEED_STAGE_BLENDING, e.SEED_STAGE_SHADOWING): e.SEED_GATE_G2_STABILITY,
    (e.SEED_STAGE_SHADOWING, e.SEED_STAGE_PROBATIONARY): e.SEED_GATE_G3_INTERFACE,
    (e.SEED_STAGE_PROBATIONARY, e.SEED_STAGE_PROBATIONARY): None,
    (e.SEED_STAGE_PROBATIONARY, e.SEED_STAGE_FOSSILIZED): e.SEED_GATE_G4_SYSTEM_IMPACT,
    (e.SEED_STAGE_FOSSILIZED, e.SEED_STAGE_TERMINATED): None,
    (e.SEED_STAGE_GERMINATED, e.SEED_STAGE_CULLED): None,
    (e.SEED_STAGE_TRAINING, e.SEED_STAGE_CULLED): None,
    (e.SEED_STAGE_BLENDING, e.SEED_STAGE_CULLED): None,
    (e.SEED_STAGE_SHADOWING, e.SEED_STAGE_CULLED): None,
    (e.SEED_STAGE_PROBATIONARY, e.SEED_STAGE_CULLED): None,
    (e.SEED_STAGE_CULLED, e.SEED_STAGE_EMBARGOED): None,
    (e.SEED_STAGE_EMBARGOED, e.SEED_STAGE_RESETTING): e.SEED_GATE_G5_RESET,
    (e.SEED_STAGE_RESETTING, e.SEED_STAGE_DORMANT): None,
}
LEGAL_OPERATIONS: dict[tuple[Operation, Stage], Stage] = {
    (e.SEED_OP_GERMINATE, e.SEED_STAGE_DORMANT): e.SEED_STAGE_GERMINATED,
    (e.SEED_OP_START_TRAINING, e.SEED_STAGE_GERMINATED): e.SEED_STAGE_TRAINING,
    (e.SEED_OP_START_GRAFTING, e.SEED_STAGE_TRAINING): e.SEED_STAGE_BLENDING,
    (e.SEED_OP_STABILIZE, e.SEED_STAGE_BLENDING): e.SEED_STAGE_SHADOWING,
    (e.SEED_OP_EVALUATE, e.SEED_STAGE_SHADOWING): e.SEED_STAGE_PROBATIONARY,
    (e.SEED_OP_FINE_TUNE, e.SEED_STAGE_PROBATIONARY): e.SEED_STAGE_PROBATIONARY,
    (e.SEED_OP_FOSSILIZE, e.SEED_STAGE_PROBATIONARY): e.SEED_STAGE_FOSSILIZED,
    (e.SEED_OP_CULL, e.SEED_STAGE_GERMINATED): e.SEED_STAGE_CULLED,
    (e.SEED_OP_CULL, e.SEED_STAGE_TRAINING): e.SEED_STAGE_CULLED,
    (e.SEED_OP_CULL, e.SEED_STAGE_BLENDING): e.SEED_STAGE_CULLED,
    (e.SEED_OP_CULL, e.SEED_STAGE_SHADOWING): e.SEED_STAGE_CULLED,
    (e.SEED_OP_CULL, e.SEED_STAGE_PROBATIONARY): e.SEED_STAGE_CULLED,
    (e.SEED_OP_CANCEL, e.SEED_STAGE_GERMINATED): e.SEED_STAGE_CULLED,
    (e.SEED_OP_CANCEL, e.SEED_STAGE_TRAINING): e.SEED_STAGE_CULLED,
    (e.SEED_OP_CANCEL, e.SEED_STAGE_FOSSILIZED): e.SEED_STAGE_TERMINATED,
}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(STAGES, STAGES)))
def test_transitions(source: Stage, target: Stage) -> None:
    """Each pair of stages is a legal transition with its gate, or raises an error that names both."""
    if (source, target) in LEGAL_TRANSITIONS:
        assert LEGAL_TRANSITIONS[source, target] == TRANSITIONS[source, target]
    else:
        seed = replace(HEALTHY.seed, stage=source)
        with pytest.raises(IllegalMoveError, match=f"{stage_name(source)} cannot go to {stage_name(target)}"):
            closed_reason(target, seed, HEALTHY.seen)


@pytest.mark.parametrize(("operation", "stage"), list(itertools.product(OPERATION_VALUES, STAGES)))
def test_operations(operation: Operation, stage: Stage) -> None:
    """Each operation in each stage leads to its target, or raises an error that names both."""
    if (operation, stage) in LEGAL_OPERATIONS:
        assert LEGAL_OPERATIONS[operation, stage] == target_of(operation, stage)
    else:
        with pytest.raises(IllegalMoveError, match=f"{operation_name(operation)} does not fit .*{stage_name(stage)}"):
            target_of(operation, stage)


def test_operations_are_legal_transitions() -> None:
    """Each operation and automatic transition is a legal transition."""
    assert OPERATIONS == LEGAL_OPERATIONS
    used = {(stage, target) for (_, stage), target in OPERATIONS.items()} | set(AUTOMATIC.items())
    assert used <= set(LEGAL_TRANSITIONS)


def test_the_active_stages() -> None:
    """Exactly the seeds from germination to probation are active; these can be culled."""
    assert {
        e.SEED_STAGE_GERMINATED,
        e.SEED_STAGE_TRAINING,
        e.SEED_STAGE_BLENDING,
        e.SEED_STAGE_SHADOWING,
        e.SEED_STAGE_PROBATIONARY,
    } == GROWING


def test_numbers_that_the_contract_lacks() -> None:
    """A stage or operation of a newer contract raises like any other illegal one."""
    with pytest.raises(IllegalMoveError, match="stage 77 cannot go to 78"):
        closed_reason(78, replace(HEALTHY.seed, stage=77), HEALTHY.seen)  # type: ignore[arg-type]
    with pytest.raises(IllegalMoveError, match="operation 79 does not fit a seed in stage 77"):
        target_of(79, 77)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """A seed and what is known about it."""

    seed: Seed
    seen: Observation


HEALTHY = Case(
    Seed(
        seed_id="s",
        blueprint_id="lora",
        slot="x",
        stage=e.SEED_STAGE_TRAINING,
        blending_steps=200,
        entered_epoch=6,
        losses=(1.0, 0.9),
        alpha=AlphaSchedule(start=0.0, end=1.0, begin_step=100, duration_steps=200),
        accuracy_before=0.9,
    ),
    Observation(
        state=SystemStatePacket(version=1, current_epoch=9, global_step=300, validation_accuracy=0.9),
        reported=SeedState(seed_id="s", gradient_norm=0.5),
        slot_free=True,
    ),
)


def with_seed(**changes: Any) -> Case:
    """Returns the healthy case with a changed seed."""
    return replace(HEALTHY, seed=replace(HEALTHY.seed, **changes))


def with_observation(**changes: Any) -> Case:
    """Returns the healthy case with a changed observation."""
    return replace(HEALTHY, seen=replace(HEALTHY.seen, **changes))


def reported(norm: float) -> Case:
    """Returns the case of a seed with this gradient norm."""
    return with_observation(reported=SeedState(seed_id="s", gradient_norm=norm))


def measured(accuracy: float, before: float) -> Case:
    """Returns the case of a seed on probation for 3 epochs with these validation accuracies."""
    state = SystemStatePacket(current_epoch=9, validation_accuracy=accuracy)
    return Case(replace(HEALTHY.seed, accuracy_before=before), replace(HEALTHY.seen, state=state))


def closed(gate: Gate | None, case: Case) -> str | None:
    """Returns why the gate is closed in a case, for the seed in the stage before it."""
    source, target = next(transition for transition, known in LEGAL_TRANSITIONS.items() if known == gate)
    return closed_reason(target, replace(case.seed, stage=source), case.seen)


@pytest.mark.parametrize("gate", [gate for gate in e.SeedLifecycleGate.values() if gate != e.SEED_GATE_UNKNOWN])
def test_every_gate_is_open_for_a_healthy_seed(gate: Gate) -> None:
    """Each gate of the contract is defined and opens."""
    assert closed(gate, HEALTHY) is None


def test_a_transition_without_a_gate_is_open() -> None:
    """The seed may always start to train."""
    assert closed(None, HEALTHY) is None


@pytest.mark.parametrize(
    ("gate", "case", "reason"),
    [
        (e.SEED_GATE_G0_SANITY, with_seed(blueprint_id="nosuch"), "blueprint 'nosuch' is unknown"),
        (e.SEED_GATE_G0_SANITY, with_observation(slot_free=False), "slot is taken"),
        (e.SEED_GATE_G1_GRADIENT_HEALTH, with_observation(reported=None), "no gradient norm"),
        (e.SEED_GATE_G1_GRADIENT_HEALTH, reported(math.nan), "is nan"),
        (e.SEED_GATE_G1_GRADIENT_HEALTH, reported(math.inf), "is inf"),
        (e.SEED_GATE_G1_GRADIENT_HEALTH, reported(0.0), "vanished"),
        (e.SEED_GATE_G2_STABILITY, with_seed(losses=(1.0,)), "1 of 2 epochs"),
        (e.SEED_GATE_G2_STABILITY, with_seed(losses=(1.0, math.nan)), "not finite"),
        (e.SEED_GATE_G2_STABILITY, with_seed(losses=(1.0, 1.2)), "rises"),
        (e.SEED_GATE_G2_STABILITY, with_seed(losses=(-1.0, -0.8)), "rises"),
        (e.SEED_GATE_G3_INTERFACE, with_seed(alpha=None), "no alpha"),
        (e.SEED_GATE_G3_INTERFACE, with_observation(state=SystemStatePacket(global_step=299)), "end at step 300"),
        (e.SEED_GATE_G4_SYSTEM_IMPACT, with_seed(entered_epoch=7), "2 of 3 epochs"),
        (e.SEED_GATE_G4_SYSTEM_IMPACT, measured(0.88, 0.9), "fell from 0.9000 to 0.8800"),
        (e.SEED_GATE_G4_SYSTEM_IMPACT, measured(math.nan, 0.9), "not known"),
        (e.SEED_GATE_G4_SYSTEM_IMPACT, measured(0.9, math.nan), "not known"),
        (e.SEED_GATE_G5_RESET, with_seed(entered_epoch=8), "1 epochs of embargo left"),
    ],
)
def test_a_closed_gate_has_a_reason(gate: Gate, case: Case, reason: str) -> None:
    """Each condition that closes a gate is named in the reason."""
    assert reason in (closed(gate, case) or "")


def test_changes_within_the_tolerances_close_no_gate() -> None:
    """Small drops of accuracy and small rises of the loss pass, and a falling loss is stable."""
    assert closed(e.SEED_GATE_G4_SYSTEM_IMPACT, measured(0.895, 0.9)) is None
    assert closed(e.SEED_GATE_G2_STABILITY, with_seed(losses=(1.0, 1.05))) is None
    assert closed(e.SEED_GATE_G2_STABILITY, with_seed(losses=(-1.0, -0.95))) is None
    assert closed(e.SEED_GATE_G2_STABILITY, with_seed(losses=(1.0, 0.1))) is None


def test_the_reported_loss_of_a_seed_takes_precedence() -> None:
    """Without one the validation loss of the host is used."""
    state = SystemStatePacket(validation_loss=2.0)
    assert loss_of(SeedState(metrics={"loss": 0.5}), state) == 0.5
    assert loss_of(SeedState(), state) == 2.0
    assert loss_of(None, state) == 2.0
