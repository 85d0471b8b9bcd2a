"""The lifecycle stages of a seed as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

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
from tolaria.values.seeds import FOSSILIZED, FULL_STRENGTH, Stage

ABSENT: Final = frozenset(
    {SEED_STAGE_UNKNOWN, SEED_STAGE_DORMANT, SEED_STAGE_CULLED, SEED_STAGE_EMBARGOED, SEED_STAGE_RESETTING}
)
"""Desired stages in which a seed is not in the model."""

TRAINED: Final = frozenset({SEED_STAGE_TRAINING, SEED_STAGE_BLENDING, SEED_STAGE_SHADOWING, SEED_STAGE_PROBATIONARY})
"""Stages in which a seed's parameters are trained."""

BLENDED: Final = frozenset({SEED_STAGE_BLENDING, SEED_STAGE_SHADOWING, SEED_STAGE_PROBATIONARY, *FOSSILIZED})
"""Stages in which a seed's alpha may be above zero, so that it needs a schedule."""

# Stages may be skipped, since a service in conservative mode, or restored to an earlier step, misses some. There is no
# way back, since a blended seed cannot be unblended without a jump; a seed leaves by being culled. A seed that was
# never grafted cannot become part of the host, as this process does not have its trained tensors.
SUCCESSORS: Final[Mapping[Stage | None, frozenset[Stage]]] = {
    None: frozenset({SEED_STAGE_GERMINATED, *TRAINED}),
    SEED_STAGE_GERMINATED: frozenset({SEED_STAGE_GERMINATED, *TRAINED, *FOSSILIZED}),
    SEED_STAGE_TRAINING: frozenset({*TRAINED, *FOSSILIZED}),
    SEED_STAGE_BLENDING: frozenset({SEED_STAGE_BLENDING, SEED_STAGE_SHADOWING, *FULL_STRENGTH}),
    SEED_STAGE_SHADOWING: frozenset({SEED_STAGE_SHADOWING, *FULL_STRENGTH}),
    SEED_STAGE_PROBATIONARY: FULL_STRENGTH,
    SEED_STAGE_FOSSILIZED: FOSSILIZED,
    SEED_STAGE_TERMINATED: frozenset({SEED_STAGE_TERMINATED}),
    SEED_STAGE_CULLED: frozenset(),
}
"""The stages that may follow a stage; None: of a seed that is not in the model."""


def stage_name(stage: int) -> str:
    """Returns the contract's name of a stage without its prefix; "stage N" for an unknown number."""
    if stage not in SeedLifecycleStage.values():
        return f"stage {stage}"
    return SeedLifecycleStage.Name(stage).removeprefix("SEED_STAGE_")  # type: ignore[arg-type] # checked above
