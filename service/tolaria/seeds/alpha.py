"""Blending strength as a function of the global step. Pure; the exact arithmetic behind an `AlphaSchedule`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState


@dataclass(frozen=True, slots=True)
class Ramp:
    """Linear from `start` at `begin_step` to `end` `duration_steps` later, constant outside.

    Kept apart from the message, whose floats have 32 bits: a ramp that takes a seed out begins at precisely the alpha
    that it had, or the output would not be bit-equal at that moment.
    """

    start: float
    end: float
    begin_step: int
    duration_steps: int

    def at(self, step: int) -> float:
        """Alpha at a global step. Without a duration it jumps from `start` to `end` at `begin_step`."""
        if step < self.begin_step:
            return self.start
        if step >= self.begin_step + self.duration_steps:
            return self.end
        return self.start + (self.end - self.start) * ((step - self.begin_step) / self.duration_steps)

    def ended(self, step: int) -> bool:
        """Whether alpha stays what it is from `step` on."""
        return step >= self.begin_step + self.duration_steps

    def begun_at(self, step: int) -> Ramp:
        """The same way, for a seed that enters it at `step`: no part of it has passed, so that it enters at `start`.

        A wish may arrive steps after the schedule's begin; entered midway, the output would jump.
        """
        return replace(self, begin_step=max(self.begin_step, step), duration_steps=max(1, self.duration_steps))

    def problem(self) -> str | None:
        """Why it cannot be used; None when it can."""
        if all(math.isfinite(alpha) and 0.0 <= alpha <= 1.0 for alpha in (self.start, self.end)):
            return None
        return f"alpha from {self.start:g} to {self.end:g} is not within 0 to 1"

    def reported_as(self, state: SeedState) -> bool:
        """Whether `state` carries this ramp as it was reported, rounded to the message's floats."""
        return state.HasField("alpha") and state.alpha == self.message()

    def message(self) -> AlphaSchedule:
        """As the contract has it, in floats of 32 bits."""
        return AlphaSchedule(
            start=self.start, end=self.end, begin_step=self.begin_step, duration_steps=self.duration_steps
        )


def asked_ramp(state: SeedState) -> Ramp | None:
    """The schedule in a wish; of older peers, which send only `metrics["alpha"]`, that number; None without either."""
    if state.HasField("alpha"):
        return ramp_of(state.alpha)
    if "alpha" in state.metrics:
        return Ramp(start=state.metrics["alpha"], end=state.metrics["alpha"], begin_step=0, duration_steps=0)
    return None


def ramp_of(schedule: AlphaSchedule) -> Ramp:
    """The message's ramp."""
    return Ramp(schedule.start, schedule.end, schedule.begin_step, schedule.duration_steps)
