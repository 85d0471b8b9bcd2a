"""The alpha of a seed, its weight in the model's output, as a function of the global step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState


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


def declared_ramp(state: SeedState) -> Ramp | None:
    """Returns the schedule in a state; a constant for older peers that send `metrics["alpha"]`; else None."""
    if state.HasField("alpha"):
        schedule = state.alpha
        return Ramp(schedule.start, schedule.end, schedule.begin_step, schedule.duration_steps)
    if "alpha" in state.metrics:
        return Ramp(start=state.metrics["alpha"], end=state.metrics["alpha"], begin_step=0, duration_steps=0)
    return None
