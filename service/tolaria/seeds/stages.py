"""What each stage of a seed means for the model, as tables. Holds no seeds, no tensors, no time.

Must not know why a seed is in its stage: gates and decisions are Kasmina's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from leyline.v1.enums_pb2 import (
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
    SeedLifecycleStage,
)

Stage: TypeAlias = "SeedLifecycleStage.ValueType"

ABSENT: Final = frozenset(
    {SEED_STAGE_UNKNOWN, SEED_STAGE_DORMANT, SEED_STAGE_CULLED, SEED_STAGE_EMBARGOED, SEED_STAGE_RESETTING}
)
"""A seed desired in one of these has nothing in the model."""

LEARNING: Final = frozenset({SEED_STAGE_TRAINING, SEED_STAGE_BLENDING, SEED_STAGE_SHADOWING, SEED_STAGE_PROBATIONARY})
"""Stages in which a seed's parameters are trained."""

FOSSIL: Final = frozenset({SEED_STAGE_FOSSILIZED, SEED_STAGE_TERMINATED})
"""Part of the host: frozen, for good, and the slot is free for a further seed behind it."""

AUDIBLE: Final = frozenset({SEED_STAGE_BLENDING, SEED_STAGE_SHADOWING, SEED_STAGE_PROBATIONARY, *FOSSIL})
"""Stages in which a seed's alpha may be above zero, so that it needs a schedule."""

FULL_STRENGTH: Final = frozenset({SEED_STAGE_PROBATIONARY, *FOSSIL})
"""Stages that are entered at the schedule's end only, and stay there."""

# Stage -> the stages that may follow, None being a seed that is not in the model. Moves forward may skip stages: a
# service in conservative mode, or restored to an earlier step, meets wishes that have gone on without it. Nothing goes
# back, since what was blended cannot be unblended without a jump; a seed leaves by being culled. What was never grafted
# here cannot become part of the host: its trained tensors are elsewhere.
FOLLOWERS: Final[Mapping[Stage | None, frozenset[Stage]]] = {
    None: frozenset({SEED_STAGE_GERMINATED, *LEARNING}),
    SEED_STAGE_GERMINATED: frozenset({SEED_STAGE_GERMINATED, *LEARNING, *FOSSIL}),
    SEED_STAGE_TRAINING: frozenset({*LEARNING, *FOSSIL}),
    SEED_STAGE_BLENDING: frozenset({SEED_STAGE_BLENDING, SEED_STAGE_SHADOWING, *FULL_STRENGTH}),
    SEED_STAGE_SHADOWING: frozenset({SEED_STAGE_SHADOWING, *FULL_STRENGTH}),
    SEED_STAGE_PROBATIONARY: FULL_STRENGTH,
    SEED_STAGE_FOSSILIZED: FOSSIL,
    SEED_STAGE_TERMINATED: frozenset({SEED_STAGE_TERMINATED}),
    SEED_STAGE_CULLED: frozenset(),
}


def stage_name(stage: int) -> str:
    """The contract's name of a stage, without its prefix; numbers that it lacks (enums are open) read as themselves."""
    if stage not in SeedLifecycleStage.values():
        return f"stage {stage}"
    return SeedLifecycleStage.Name(stage).removeprefix("SEED_STAGE_")  # type: ignore[arg-type] # it is one, just checked


def stage_named(name: str) -> Stage:
    """The stage of that name.

    Raises:
        ValueError: there is none.
    """
    return SeedLifecycleStage.Value(f"SEED_STAGE_{name}")
