from __future__ import annotations

import itertools

import pytest

from leyline.v1 import enums_pb2 as e
from tolaria.errors import IllegalMoveError
from tolaria.reference.lifecycle import (
    LIVING,
    OPERATIONS,
    PROGRESS,
    TRANSITIONS,
    Gate,
    Operation,
    Stage,
    gate_between,
    operation_name,
    stage_word,
    target_of,
)

STAGES = e.SeedLifecycleStage.values()
OPERATION_VALUES = e.SeedOperation.values()

# Written out a second time, in words, so that a slip in the tables shows.
LEGAL_MOVES: dict[tuple[Stage, Stage], Gate | None] = {
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
def test_moves(source: Stage, target: Stage) -> None:
    """Every pair of stages is either a legal move with its gate, or raises and names both stages."""
    if (source, target) in LEGAL_MOVES:
        assert LEGAL_MOVES[source, target] == gate_between(source, target)
    else:
        with pytest.raises(IllegalMoveError, match=f"{stage_word(source)} cannot go to {stage_word(target)}"):
            gate_between(source, target)


@pytest.mark.parametrize(("operation", "stage"), list(itertools.product(OPERATION_VALUES, STAGES)))
def test_operations(operation: Operation, stage: Stage) -> None:
    """Every operation in every stage either asks for its move or raises and names both."""
    if (operation, stage) in LEGAL_OPERATIONS:
        assert LEGAL_OPERATIONS[operation, stage] == target_of(operation, stage)
    else:
        with pytest.raises(IllegalMoveError, match=f"{operation_name(operation)} does not fit .*{stage_word(stage)}"):
            target_of(operation, stage)


def test_tables_are_complete() -> None:
    """Every stage and every operation of the contract has its row, and each wish and each progress is a legal move."""
    assert set(STAGES) == set(TRANSITIONS)
    assert set(OPERATION_VALUES) == set(OPERATIONS)
    wishes = {move for moves in OPERATIONS.values() for move in moves.items()} | set(PROGRESS.items())
    assert wishes <= set(LEGAL_MOVES)


def test_living_seeds_can_be_culled() -> None:
    """A stage is a living one exactly when culling is open to it."""
    assert {stage for stage in STAGES if e.SEED_STAGE_CULLED in TRANSITIONS[stage]} == LIVING


def test_numbers_beyond_the_contract() -> None:
    """A stage or operation of a newer contract is refused like any other illegal move."""
    with pytest.raises(IllegalMoveError, match="stage 77 cannot go to 78"):
        gate_between(77, 78)  # type: ignore[arg-type]
    with pytest.raises(IllegalMoveError, match="operation 79 does not fit a seed in stage 77"):
        target_of(79, 77)  # type: ignore[arg-type]
