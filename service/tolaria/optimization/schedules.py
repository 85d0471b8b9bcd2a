"""Learning-rate schedules as functions of the global step.

Every schedule returns a *factor* in [0, 1] of a base learning rate, so that several param groups can follow it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from tolaria.errors import ScheduleError


class AfterPeriod(StrEnum):
    """What a cosine does after its period."""

    RESTART = "restart"
    HOLD = "hold"


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
        after: restart or hold.
    """

    period_steps: int
    floor: float = 0.0
    after: AfterPeriod = AfterPeriod.HOLD

    def __post_init__(self) -> None:
        _require(self.period_steps >= 1, "period_steps", f"must be at least 1, not {self.period_steps}")
        _require_fraction("floor", self.floor)

    def factor_at(self, step: int) -> float:
        """Returns the factor `step` steps after the start of the policy."""
        if step >= self.period_steps and self.after is AfterPeriod.HOLD:
            return self.floor
        turn = math.cos(math.pi * (step % self.period_steps) / self.period_steps)
        return max(self.floor, 1.0 - (1.0 - self.floor) * (1.0 - turn) / 2.0)  # exactly 1 at step 0


@dataclass(frozen=True, slots=True)
class StepDecay:
    """Step decay: `max(floor, decay ** (t // every_steps))` (He et al., CVPR 2016, section 3.4).

    Args:
        every_steps: steps between two cuts, at least 1.
        decay: factor of each cut, in (0, 1].
        floor: the least factor, in [0, 1].
    """

    every_steps: int
    decay: float = 0.1
    floor: float = 0.0

    def __post_init__(self) -> None:
        _require(self.every_steps >= 1, "every_steps", f"must be at least 1, not {self.every_steps}")
        _require_fraction("decay", self.decay)
        _require(self.decay > 0.0, "decay", "must be above 0")
        _require_fraction("floor", self.floor)

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

    steps: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "warmup_steps", f"must not be negative, is {self.steps}")
        _require_fraction("warmup_floor", self.floor)

    def factor_at(self, step: int) -> float:
        """Returns the factor `step` steps after the start of the warm-up."""
        if step >= self.steps:
            return 1.0
        return self.floor + (1.0 - self.floor) * step / self.steps


@dataclass(frozen=True, slots=True)
class Schedule:
    """A warm-up followed by a policy. Both are 1 at the step between them."""

    policy: Policy
    warmup: Warmup = field(default_factory=Warmup)

    def factor_at(self, step: int) -> float:
        """Returns the factor of the step after `step` steps.

        Raises:
            ScheduleError: `step` is negative.
        """
        _require(step >= 0, "step", f"must not be negative, is {step}")
        if step < self.warmup.steps:
            return self.warmup.factor_at(step)
        return self.policy.factor_at(step - self.warmup.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """A schedule as in a settings file.

    Args:
        policy: "constant", "cosine" or "step".
        period_steps: of a cosine, or between two cuts of "step". None, for a cosine in a run of known length: the rest
            of the run after the warm-up.
        floor: least factor of the policy.
        decay: factor of each cut of "step".
        after_period: "restart" or "hold", of a cosine.
        warmup_steps: 0 for none.
        warmup_floor: factor of the warm-up's first step.
    """

    policy: str
    period_steps: int | None
    floor: float
    decay: float
    after_period: str
    warmup_steps: int
    warmup_floor: float


def build_schedule(spec: ScheduleSpec, *, run_steps: int | None = None) -> Schedule:
    """Returns the schedule that `spec` describes.

    Args:
        spec: as read from the settings.
        run_steps: steps of the whole run; None if unknown.

    Raises:
        ScheduleError: a field is unknown, out of range, or impossible in a run of that length; names it.
    """
    warmup = Warmup(spec.warmup_steps, spec.warmup_floor)
    if run_steps is not None:
        _require(
            warmup.steps <= run_steps, "warmup_steps", f"{warmup.steps} is longer than the run of {run_steps} steps"
        )
    return Schedule(_build_policy(spec, run_steps), warmup)


def _build_policy(spec: ScheduleSpec, run_steps: int | None) -> Policy:
    match spec.policy:
        case "constant":
            return Constant()
        case "cosine":
            rest = None if run_steps is None else max(1, run_steps - spec.warmup_steps)
            return Cosine(_period(spec, rest), spec.floor, _after_period(spec.after_period))
        case "step":
            return StepDecay(_period(spec, None), spec.decay, spec.floor)
        case unknown:
            raise ScheduleError("policy", f"{unknown!r} is unknown; there are constant, cosine and step")


def _period(spec: ScheduleSpec, default: int | None) -> int:
    period_steps = default if spec.period_steps is None else spec.period_steps
    if period_steps is None:
        raise ScheduleError("period_steps", f"is needed by the policy {spec.policy!r} here")
    return period_steps


def _after_period(name: str) -> AfterPeriod:
    if name not in set(AfterPeriod):
        raise ScheduleError("after_period", f"{name!r} is unknown; there are {' and '.join(AfterPeriod)}")
    return AfterPeriod(name)


def _require_fraction(field: str, value: float) -> None:
    _require(0.0 <= value <= 1.0, field, f"must be between 0 and 1, is {value}")


def _require(condition: bool, field: str, detail: str) -> None:
    if not condition:
        raise ScheduleError(field, detail)
