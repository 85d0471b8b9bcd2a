"""Learning-rate schedules as pure functions of the global step.

Owns their formulas and what makes them impossible. Every schedule gives a *factor* in [0, 1] of a base learning rate,
so that several param groups can follow one schedule. Knows nothing of optimizers, tensors or groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from tolaria.errors import ScheduleError


class AfterPeriod(StrEnum):
    """What a cosine does when its period is over."""

    RESTART = "restart"
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class Constant:
    """Always the base learning rate."""

    def factor_at(self, step: int) -> float:  # noqa: ARG002 - every policy is asked with the step
        """Return 1 for every step."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Cosine:
    """Cosine annealing (Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5, with all periods alike).

    With t the steps into the period, T its length and m the floor: `m + (1 - m) (1 + cos(pi t / T)) / 2`.
    After T steps it restarts at 1, or holds m for good.

    Args:
        period_steps: T, at least 1.
        floor: m, the least factor, in [0, 1].
        after: restart or hold.
    """

    period_steps: int
    floor: float = 0.0
    after: AfterPeriod = AfterPeriod.HOLD

    def __post_init__(self) -> None:
        _demand(self.period_steps >= 1, "period_steps", f"must be at least 1, not {self.period_steps}")
        _demand_share("floor", self.floor)

    def factor_at(self, step: int) -> float:
        """The factor `step` steps after the policy began."""
        if step >= self.period_steps and self.after is AfterPeriod.HOLD:
            return self.floor
        turn = math.cos(math.pi * (step % self.period_steps) / self.period_steps)
        return max(self.floor, 1.0 - (1.0 - self.floor) * (1.0 - turn) / 2.0)  # so written it begins at exactly 1


@dataclass(frozen=True, slots=True)
class StepDecay:
    """Cut at equal distances: `max(floor, decay ** (t // every_steps))` (He et al., CVPR 2016, section 3.4).

    Args:
        every_steps: steps between two cuts, at least 1.
        decay: what each cut leaves, in (0, 1].
        floor: the least factor, in [0, 1].
    """

    every_steps: int
    decay: float = 0.1
    floor: float = 0.0

    def __post_init__(self) -> None:
        _demand(self.every_steps >= 1, "every_steps", f"must be at least 1, not {self.every_steps}")
        _demand_share("decay", self.decay)
        _demand(self.decay > 0.0, "decay", "must be above 0")
        _demand_share("floor", self.floor)

    def factor_at(self, step: int) -> float:
        """The factor `step` steps after the policy began."""
        return max(self.floor, math.pow(self.decay, step // self.every_steps))


Policy = Constant | Cosine | StepDecay


@dataclass(frozen=True, slots=True)
class Warmup:
    """Linear warm-up (Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 2.2): `f + (1 - f) t / W`, then 1.

    Args:
        steps: W; 0 for none. Step W is the first at full rate.
        floor: f, the factor of the first step, in [0, 1]. With 0 the very first update moves nothing.
    """

    steps: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        _demand(self.steps >= 0, "warmup_steps", f"must not be negative, is {self.steps}")
        _demand_share("warmup_floor", self.floor)

    def factor_at(self, step: int) -> float:
        """The factor `step` steps after the warm-up began."""
        if step >= self.steps:
            return 1.0
        return self.floor + (1.0 - self.floor) * step / self.steps


@dataclass(frozen=True, slots=True)
class Schedule:
    """A policy that begins when its warm-up ends. Both give 1 at that step, so nothing jumps there."""

    policy: Policy
    warmup: Warmup = field(default_factory=Warmup)

    def factor_at(self, step: int) -> float:
        """The factor for the update after which `step + 1` updates are done; `step` counts from 0.

        Raises:
            ScheduleError: for a negative step.
        """
        _demand(step >= 0, "step", f"must not be negative, is {step}")
        if step < self.warmup.steps:
            return self.warmup.factor_at(step)
        return self.policy.factor_at(step - self.warmup.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """A schedule in the words of a settings file.

    Args:
        policy: "constant", "cosine" or "step".
        period_steps: of a cosine, or between two cuts of "step". None, for a cosine in a run of known length: all that
            the warm-up leaves of it.
        floor: least factor of the policy.
        decay: what a cut of "step" leaves.
        after_period: "restart" or "hold", of a cosine.
        warmup_steps: 0 for none.
        warmup_floor: factor of the warm-up's first step.
    """

    policy: str = "constant"
    period_steps: int | None = None
    floor: float = 0.0
    decay: float = 0.1
    after_period: str = "hold"
    warmup_steps: int = 0
    warmup_floor: float = 0.0


def build_schedule(spec: ScheduleSpec, *, run_steps: int | None = None) -> Schedule:
    """The schedule that `spec` describes.

    Args:
        spec: as read from the settings.
        run_steps: updates in the whole run, None when unknown.

    Raises:
        ScheduleError: naming the field that is unknown, out of range, or impossible in a run of that length.
    """
    warmup = Warmup(spec.warmup_steps, spec.warmup_floor)
    if run_steps is not None:
        _demand(
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


def _period(spec: ScheduleSpec, otherwise: int | None) -> int:
    period_steps = otherwise if spec.period_steps is None else spec.period_steps
    if period_steps is None:
        raise ScheduleError("period_steps", f"is needed by the policy {spec.policy!r} here")
    return period_steps


def _after_period(word: str) -> AfterPeriod:
    if word not in set(AfterPeriod):
        raise ScheduleError("after_period", f"{word!r} is unknown; there are {' and '.join(AfterPeriod)}")
    return AfterPeriod(word)


def _demand_share(field: str, value: float) -> None:
    _demand(0.0 <= value <= 1.0, field, f"must be between 0 and 1, is {value}")


def _demand(holds: bool, field: str, detail: str) -> None:
    if not holds:
        raise ScheduleError(field, detail)
