"""The lifecycle stages of a seed as tables, and its alpha as a function of the global step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState

Stage: TypeAlias = "SeedLifecycleStage.ValueType"

ABSENT: Final = frozenset(
    {SEED_STAGE_UNKNOWN, SEED_STAGE_DORMANT, SEED_STAGE_CULLED, SEED_STAGE_EMBARGOED, SEED_STAGE_RESETTING}
)
"""Desired stages in which a seed is not in the model."""

TRAINED: Final = frozenset({SEED_STAGE_TRAINING, SEED_STAGE_BLENDING, SEED_STAGE_SHADOWING, SEED_STAGE_PROBATIONARY})
"""Stages in which a seed's parameters are trained."""

FOSSILIZED: Final = frozenset({SEED_STAGE_FOSSILIZED, SEED_STAGE_TERMINATED})
"""Stages in which a seed is a frozen part of the host, and its slot is free for a further seed behind it."""

BLENDED: Final = frozenset({SEED_STAGE_BLENDING, SEED_STAGE_SHADOWING, SEED_STAGE_PROBATIONARY, *FOSSILIZED})
"""Stages in which a seed's alpha may be above zero, so that it needs a schedule."""

FULL_STRENGTH: Final = frozenset({SEED_STAGE_PROBATIONARY, *FOSSILIZED})
"""Stages that are entered at the end of the schedule, and in which alpha stays there."""

# Stage -> the stages that may follow; None is a seed that is not in the model. Stages may be skipped, since a service
# in conservative mode, or restored to an earlier step, misses some. Nothing goes back, since what was blended cannot
# be unblended without a jump; a seed leaves by being culled. A seed that was never grafted cannot become part of the
# host: its trained tensors are elsewhere.
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


def stage_name(stage: int) -> str:
    """Returns the contract's name of a stage without its prefix; "stage N" for a number that it lacks."""
    if stage not in SeedLifecycleStage.values():
        return f"stage {stage}"
    return SeedLifecycleStage.Name(stage).removeprefix("SEED_STAGE_")  # type: ignore[arg-type] # it is one, just checked


def stage_from_name(name: str) -> Stage:
    """Returns the stage of that name.

    Raises:
        ValueError: there is none.
    """
    return SeedLifecycleStage.Value(f"SEED_STAGE_{name}")


@dataclass(frozen=True, slots=True)
class Ramp:
    """Alpha, linear from `start` at `begin_step` to `end` `duration_steps` later, constant outside.

    `AlphaSchedule` has 32-bit floats. A ramp that fades a culled seed out must begin at exactly the alpha that the
    seed had, or the model's output would jump, so the exact numbers are kept here.
    """

    start: float
    end: float
    begin_step: int
    duration_steps: int

    @property
    def end_step(self) -> int:
        """The first step at which alpha is `end`."""
        return self.begin_step + self.duration_steps

    def at(self, step: int) -> float:
        """Returns alpha at a global step. Without a duration it jumps from `start` to `end` at `begin_step`."""
        if step < self.begin_step:
            return self.start
        if step >= self.end_step:
            return self.end
        return self.start + (self.end - self.start) * ((step - self.begin_step) / self.duration_steps)

    def begun_at(self, step: int) -> Ramp:
        """Returns the ramp for a seed that enters it at `step`.

        The desired state may arrive after the schedule began; entering it midway would make the output jump. So the
        ramp begins no earlier than `step`, and lasts at least one step.
        """
        return replace(self, begin_step=max(self.begin_step, step), duration_steps=max(1, self.duration_steps))

    def problem(self) -> str | None:
        """Returns why the ramp cannot be used; None if it can."""
        if all(math.isfinite(alpha) and 0.0 <= alpha <= 1.0 for alpha in (self.start, self.end)):
            return None
        return f"alpha from {self.start:g} to {self.end:g} is not within 0 to 1"

    def reported_in(self, state: SeedState) -> bool:
        """Whether `state` carries this ramp as it was reported, rounded to the message's floats."""
        return state.HasField("alpha") and state.alpha == self.message()

    def message(self) -> AlphaSchedule:
        """Returns the ramp as the contract's message, in 32-bit floats."""
        return AlphaSchedule(
            start=self.start, end=self.end, begin_step=self.begin_step, duration_steps=self.duration_steps
        )


def desired_ramp(state: SeedState) -> Ramp | None:
    """Returns the schedule of a desired state; a constant for older peers that send `metrics["alpha"]`; else None."""
    if state.HasField("alpha"):
        schedule = state.alpha
        return Ramp(schedule.start, schedule.end, schedule.begin_step, schedule.duration_steps)
    if "alpha" in state.metrics:
        return Ramp(start=state.metrics["alpha"], end=state.metrics["alpha"], begin_step=0, duration_steps=0)
    return None
