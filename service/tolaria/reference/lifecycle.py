"""The life of a seed as tables: every transition lives here.

Owns which stage may follow which, which gate stands between them and which stage an operation asks for. Must not know
facts, time or seeds: whether a gate is open is judged in `gates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from leyline.v1.enums_pb2 import (
    SEED_GATE_G0_SANITY,
    SEED_GATE_G1_GRADIENT_HEALTH,
    SEED_GATE_G2_STABILITY,
    SEED_GATE_G3_INTERFACE,
    SEED_GATE_G4_SYSTEM_IMPACT,
    SEED_GATE_G5_RESET,
    SEED_OP_CANCEL,
    SEED_OP_CULL,
    SEED_OP_EVALUATE,
    SEED_OP_FINE_TUNE,
    SEED_OP_FOSSILIZE,
    SEED_OP_GERMINATE,
    SEED_OP_STABILIZE,
    SEED_OP_START_GRAFTING,
    SEED_OP_START_TRAINING,
    SEED_OP_UNKNOWN,
    SEED_STAGE_BLENDING,
    SEED_STAGE_CULLED,
    SEED_STAGE_DORMANT,
    SEED_STAGE_EMBARGOED,
    SEED_STAGE_FOSSILIZED,
    SEED_STAGE_GERMINATED,
    SEED_STAGE_PROBATIONARY,
    SEED_STAGE_RESETTING,
    SEED_STAGE_SHADOWING,
    SEED_STAGE_TERMINATED,
    SEED_STAGE_TRAINING,
    SEED_STAGE_UNKNOWN,
    SeedLifecycleGate,
    SeedLifecycleStage,
    SeedOperation,
)
from tolaria.errors import IllegalMoveError

Stage: TypeAlias = "SeedLifecycleStage.ValueType"
Gate: TypeAlias = "SeedLifecycleGate.ValueType"
Operation: TypeAlias = "SeedOperation.ValueType"

# Stage -> the stages that may follow, each with the gate in between (None: no gate).
TRANSITIONS: Mapping[Stage, Mapping[Stage, Gate | None]] = {
    SEED_STAGE_UNKNOWN: {},
    SEED_STAGE_DORMANT: {SEED_STAGE_GERMINATED: SEED_GATE_G0_SANITY},
    SEED_STAGE_GERMINATED: {SEED_STAGE_TRAINING: None, SEED_STAGE_CULLED: None},
    SEED_STAGE_TRAINING: {SEED_STAGE_BLENDING: SEED_GATE_G1_GRADIENT_HEALTH, SEED_STAGE_CULLED: None},
    SEED_STAGE_BLENDING: {SEED_STAGE_SHADOWING: SEED_GATE_G2_STABILITY, SEED_STAGE_CULLED: None},
    SEED_STAGE_SHADOWING: {SEED_STAGE_PROBATIONARY: SEED_GATE_G3_INTERFACE, SEED_STAGE_CULLED: None},
    SEED_STAGE_PROBATIONARY: {
        SEED_STAGE_PROBATIONARY: None,  # fine-tuning starts the probation over
        SEED_STAGE_FOSSILIZED: SEED_GATE_G4_SYSTEM_IMPACT,
        SEED_STAGE_CULLED: None,
    },
    SEED_STAGE_FOSSILIZED: {SEED_STAGE_TERMINATED: None},
    SEED_STAGE_CULLED: {SEED_STAGE_EMBARGOED: None},
    SEED_STAGE_EMBARGOED: {SEED_STAGE_RESETTING: SEED_GATE_G5_RESET},
    SEED_STAGE_RESETTING: {SEED_STAGE_DORMANT: None},
    SEED_STAGE_TERMINATED: {},
}

# Operation -> the move that it asks for, by the stage the seed is in.
OPERATIONS: Mapping[Operation, Mapping[Stage, Stage]] = {
    SEED_OP_UNKNOWN: {},
    SEED_OP_GERMINATE: {SEED_STAGE_DORMANT: SEED_STAGE_GERMINATED},
    SEED_OP_START_TRAINING: {SEED_STAGE_GERMINATED: SEED_STAGE_TRAINING},
    SEED_OP_START_GRAFTING: {SEED_STAGE_TRAINING: SEED_STAGE_BLENDING},
    SEED_OP_STABILIZE: {SEED_STAGE_BLENDING: SEED_STAGE_SHADOWING},
    SEED_OP_EVALUATE: {SEED_STAGE_SHADOWING: SEED_STAGE_PROBATIONARY},
    SEED_OP_FINE_TUNE: {SEED_STAGE_PROBATIONARY: SEED_STAGE_PROBATIONARY},
    SEED_OP_FOSSILIZE: {SEED_STAGE_PROBATIONARY: SEED_STAGE_FOSSILIZED},
    SEED_OP_CULL: {
        SEED_STAGE_GERMINATED: SEED_STAGE_CULLED,
        SEED_STAGE_TRAINING: SEED_STAGE_CULLED,
        SEED_STAGE_BLENDING: SEED_STAGE_CULLED,
        SEED_STAGE_SHADOWING: SEED_STAGE_CULLED,
        SEED_STAGE_PROBATIONARY: SEED_STAGE_CULLED,
    },
    # Takes back a seed that has not touched the host's output yet, or closes the books on one that is part of the host.
    SEED_OP_CANCEL: {
        SEED_STAGE_GERMINATED: SEED_STAGE_CULLED,
        SEED_STAGE_TRAINING: SEED_STAGE_CULLED,
        SEED_STAGE_FOSSILIZED: SEED_STAGE_TERMINATED,
    },
}

# Where a seed goes by itself, once the gate on the way is open. Leaving the probation is the controller's decision.
PROGRESS: Mapping[Stage, Stage] = {
    SEED_STAGE_GERMINATED: SEED_STAGE_TRAINING,
    SEED_STAGE_TRAINING: SEED_STAGE_BLENDING,
    SEED_STAGE_BLENDING: SEED_STAGE_SHADOWING,
    SEED_STAGE_SHADOWING: SEED_STAGE_PROBATIONARY,
    SEED_STAGE_CULLED: SEED_STAGE_EMBARGOED,
    SEED_STAGE_EMBARGOED: SEED_STAGE_RESETTING,
    SEED_STAGE_RESETTING: SEED_STAGE_DORMANT,
}

LIVING: frozenset[Stage] = frozenset(
    {
        SEED_STAGE_GERMINATED,
        SEED_STAGE_TRAINING,
        SEED_STAGE_BLENDING,
        SEED_STAGE_SHADOWING,
        SEED_STAGE_PROBATIONARY,
    }
)


def gate_between(source: Stage, target: Stage) -> Gate | None:
    """The gate that guards the move from `source` to `target`; None where it is free.

    Raises:
        IllegalMoveError: when `target` may not follow `source`.
    """
    followers = TRANSITIONS.get(source, {})
    if target not in followers:
        raise IllegalMoveError(f"a seed in stage {stage_word(source)} cannot go to {stage_word(target)}")
    return followers[target]


def target_of(operation: Operation, stage: Stage) -> Stage:
    """The stage that `operation` asks for, of a seed in `stage`.

    Raises:
        IllegalMoveError: when the operation does not fit the stage, or is unknown.
    """
    targets = OPERATIONS.get(operation, {})
    if stage not in targets:
        raise IllegalMoveError(f"{operation_name(operation)} does not fit a seed in stage {stage_word(stage)}")
    return targets[stage]


def stage_word(stage: int) -> str:
    """A stage as people say it (`germinated`); numbers that the contract lacks (proto3 enums are open) stay numbers."""
    known = stage in SeedLifecycleStage.values()
    return SeedLifecycleStage.Name(stage).removeprefix("SEED_STAGE_").lower() if known else str(stage)  # type: ignore[arg-type]


def operation_name(operation: int) -> str:
    """The contract's name of an operation; numbers that it lacks read as themselves."""
    return SeedOperation.Name(operation) if operation in SeedOperation.values() else f"operation {operation}"  # type: ignore[arg-type]
