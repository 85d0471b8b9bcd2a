"""Stages and numbers of seeds, and a seed's alpha, its weight in the output, as a function of the global step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from leyline.v1 import enums_pb2 as enums
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from tolaria.config import SeedsSettings

Stage: TypeAlias = "enums.SeedLifecycleStage.ValueType"

GROWING: Final[frozenset[Stage]] = frozenset(
    {
        enums.SEED_STAGE_GERMINATED,
        enums.SEED_STAGE_TRAINING,
        enums.SEED_STAGE_BLENDING,
        enums.SEED_STAGE_SHADOWING,
        enums.SEED_STAGE_PROBATIONARY,
    }
)
"""Stages of a seed that is in the model and not yet a part of the host."""

FOSSILIZED: Final[frozenset[Stage]] = frozenset({enums.SEED_STAGE_FOSSILIZED, enums.SEED_STAGE_TERMINATED})
"""Stages in which a seed is a frozen part of the host, and its slot is free for a further seed behind it."""


FULL_STRENGTH: Final[frozenset[Stage]] = frozenset({enums.SEED_STAGE_PROBATIONARY, *FOSSILIZED})
"""Stages that are entered at the end of the schedule, and in which alpha stays there."""

SLOTS_FREE: Final = "seeds.slots_free"
"""Metric of a packet to the controller: number of slots in which a seed can be grafted; 0 if seeds are disabled."""

FOSSILIZED_LEFT: Final = "seeds.fossilized_left"
"""Metric of a packet to the controller: number of seeds that may still become a part of the host."""


@dataclass(frozen=True, slots=True)
class SeedLimits:
    """The greatest numbers of seeds that grow at the same time, and that become a part of the host.

    `active` is 0 if seeds are disabled.
    """

    active: int
    fossilized: int


NO_LIMITS: Final = SeedLimits(2**31, 2**31)
NO_SEEDS: Final = SeedLimits(0, 0)


def limits_of(settings: SeedsSettings) -> SeedLimits:
    """Returns the limits that the settings specify."""
    return SeedLimits(settings.active_max if settings.enabled else 0, settings.fossilized_max)


def count_in(stages: frozenset[Stage], seeds: Iterable[SeedState]) -> int:
    """Returns the number of seeds in one of the stages."""
    return sum(seed.stage in stages for seed in seeds)


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

        A declaration may arrive after its schedule began; entering it midway would make the output jump. So the ramp
        begins no earlier than `step`, and lasts at least one step.
        """
        return replace(self, begin_step=max(self.begin_step, step), duration_steps=max(1, self.duration_steps))

    def problem(self) -> str | None:
        """Returns why the ramp cannot be used; None if it can."""
        if all(math.isfinite(alpha) and 0.0 <= alpha <= 1.0 for alpha in (self.start, self.end)):
            return None
        return f"alpha from {self.start:g} to {self.end:g} is not within 0 to 1"

    def message(self) -> AlphaSchedule:
        """Returns the ramp as the contract's message, in 32-bit floats."""
        return AlphaSchedule(
            start=self.start, end=self.end, begin_step=self.begin_step, duration_steps=self.duration_steps
        )


def alpha_at(stage: Stage, ramp: Ramp | None, step: int) -> float:
    """Returns the alpha of a seed in this stage, with its schedule, in the forward pass after `step` steps."""
    if ramp is None or stage in {enums.SEED_STAGE_GERMINATED, enums.SEED_STAGE_TRAINING}:
        return 0.0
    return ramp.end if stage in FULL_STRENGTH else ramp.at(step)


def stage_from_name(name: str) -> Stage:
    """Returns the stage of that name.

    Raises:
        ValueError: there is none.
    """
    return enums.SeedLifecycleStage.Value(f"SEED_STAGE_{name}")


def declared_ramp(state: SeedState) -> Ramp | None:
    """Returns the schedule in a state; a constant for older peers that send `metrics["alpha"]`; else None."""
    if state.HasField("alpha"):
        schedule = state.alpha
        return Ramp(schedule.start, schedule.end, schedule.begin_step, schedule.duration_steps)
    if "alpha" in state.metrics:
        return Ramp(start=state.metrics["alpha"], end=state.metrics["alpha"], begin_step=0, duration_steps=0)
    return None
