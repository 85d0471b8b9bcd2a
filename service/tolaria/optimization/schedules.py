"""Learning-rate schedules as functions of the global step.

Every schedule returns a *factor* in [0, 1] of a base learning rate, so that several param groups can follow it.
`tolaria.config` validates the numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import assert_never

from tolaria.config import OptimizerSettings
from tolaria.errors import ScheduleError


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant learning rate."""

    def factor_at(self, step: int) -> float:  # noqa: ARG002 - every policy takes the step
        """Returns 1."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Cosine:
    """Cosine annealing (Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5, with all periods alike).

    With t the steps into the period, T its length and m the floor: `m + (1 - m) (1 + cos(pi t / T)) / 2`.
    After T steps it restarts at 1, or stays at m.

    Args:
        period_steps: T, at least 1.
        floor: m, the least factor, in [0, 1].
        restarts: whether it restarts after a period.
    """

    period_steps: int
    floor: float
    restarts: bool

    def factor_at(self, step: int) -> float:
        """Returns the factor `step` steps after the start of the policy."""
        if step >= self.period_steps and not self.restarts:
            return self.floor
        turn = math.cos(math.pi * (step % self.period_steps) / self.period_steps)
        return max(self.floor, 1.0 - (1.0 - self.floor) * (1.0 - turn) / 2.0)  # exactly 1 at step 0


@dataclass(frozen=True, slots=True)
class StepDecay:
    """Step decay: `max(floor, decay ** (t // every_steps))` (He et al., CVPR 2016, section 3.4).

    Args:
        every_steps: steps between two decays, at least 1.
        decay: factor of each decay, in (0, 1].
        floor: the least factor, in [0, 1].
    """

    every_steps: int
    decay: float
    floor: float

    def factor_at(self, step: int) -> float:
        """Returns the factor `step` steps after the start of the policy."""
        return max(self.floor, math.pow(self.decay, step // self.every_steps))


Policy = Constant | Cosine | StepDecay


@dataclass(frozen=True, slots=True)
class Warmup:
    """Linear warm-up (Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 2.2): `f + (1 - f) t / W`, then 1.

    Args:
        steps: W; 0 for none. Step W is the first at the full rate.
        floor: f, the factor of the first step, in [0, 1].
    """

    steps: int
    floor: float

    def factor_at(self, step: int) -> float:
        """Returns the factor `step` steps after the start of the warm-up."""
        if step >= self.steps:
            return 1.0
        return self.floor + (1.0 - self.floor) * step / self.steps


@dataclass(frozen=True, slots=True)
class Schedule:
    """A warm-up followed by a policy. Both are 1 at the step between them."""

    policy: Policy
    warmup: Warmup

    def factor_at(self, step: int) -> float:
        """Returns the factor of the step after `step` steps."""
        if step < self.warmup.steps:
            return self.warmup.factor_at(step)
        return self.policy.factor_at(step - self.warmup.steps)


def build_schedule(settings: OptimizerSettings, run_steps: int) -> Schedule:
    """Returns the schedule of the host in a run of `run_steps` steps.

    Raises:
        ScheduleError: the warm-up is longer than the run.
    """
    if settings.warmup_steps > run_steps:
        detail = f"{settings.warmup_steps} is longer than the run of {run_steps} steps"
        raise ScheduleError("warmup_steps", detail)
    return Schedule(_policy(settings, run_steps), Warmup(settings.warmup_steps, settings.warmup_floor))


def _policy(settings: OptimizerSettings, run_steps: int) -> Policy:
    match settings.policy:
        case "constant":
            return Constant()
        case "cosine":
            period_steps = settings.period_steps or max(1, run_steps - settings.warmup_steps)
            return Cosine(period_steps, settings.floor, restarts=settings.after_period == "restart")
        case "step":
            return StepDecay(settings.period_steps, settings.decay, settings.floor)
        case _:
            assert_never(settings.policy)
