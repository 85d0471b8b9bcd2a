"""When training has gone wrong by itself, and what to do about it. Pure: facts in, a verdict out.

Owns the limits, what they are measured against, and the budget of automatic rollbacks. Must not know how a verdict is
enacted. A step is judged against the averages of the steps before it: first `judge_step`, then `observe`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, RollbackTier
from tolaria.training.judge import Health, Proceed
from tolaria.training.reports import EpochReport, StepReport

_FLOOR: Final = 0.01
_DEVIATIONS: Final = 6.0
_LOG_DEVIATIONS: Final = 5.0


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """What is no longer healthy, and what follows.

    Args:
        loss_factor: a loss above this many times its moving average has exploded.
        norm_factor: likewise for the gradient norm.
        accuracy_drop: validation accuracy this much below the run's best (absolute, 0 to 1) has collapsed.
        warmup_steps: finite steps before the first two hold; the averages mean nothing until then.
        rollbacks_max: automatic rollbacks in `per_steps` steps.
        per_steps: see there.
        lr_cut: the learning rate's factor after an automatic rollback.
        lr_cut_steps: updates for which it holds.
    """

    loss_factor: float = 15.0
    norm_factor: float = 5.0
    accuracy_drop: float = 0.2
    warmup_steps: int = 20
    rollbacks_max: int = 3
    per_steps: int = 1000
    lr_cut: float = 0.5
    lr_cut_steps: int = 100


@dataclass(frozen=True, slots=True)
class RateCut:
    """Multiply the learning rate by `factor` for `steps` updates."""

    factor: float
    steps: int


@dataclass(frozen=True, slots=True)
class Retreat:
    """Roll back to a point of the tier before `at_step`, leave out the spoilt batches, and cut the learning rate."""

    tier: RollbackTier.ValueType
    reason: str
    at_step: int
    cut: RateCut


@dataclass(frozen=True, slots=True)
class Halt:
    """Freeze training: going on would only repeat what went wrong."""

    reason: str


Verdict = Proceed | Retreat | Halt


@dataclass(frozen=True, slots=True)
class RollbackBudget:
    """The steps at which automatic rollbacks were begun. A rollback turns the steps back, but gives nothing back."""

    begun_at: tuple[int, ...] = ()

    def spent(self, at_step: int, limits: HealthLimits) -> bool:
        """Whether there may be no other one now. Those of a later step, since undone, count as well."""
        return sum(step > at_step - limits.per_steps for step in self.begun_at) >= limits.rollbacks_max

    def after(self, at_step: int, limits: HealthLimits) -> RollbackBudget:
        """With one more, begun at this step. Forgets those that can never count again from here on forward."""
        kept = sorted((*self.begun_at, at_step))[-limits.rollbacks_max :]
        return RollbackBudget(tuple(kept))


@dataclass(frozen=True, slots=True)
class Record:
    """What the run was like at its best and at its loudest: the scale for what is new.

    `loss_level` and `norm_level` are the highest that the moving averages have been since the warm-up. Not part of the
    training state: a rollback does not turn it back.
    """

    loss_level: float = 0.0
    norm_level: float = 0.0
    best_accuracy: float = 0.0
    budget: RollbackBudget = RollbackBudget()

    def after_step(self, health: Health, limits: HealthLimits) -> Record:
        """With the averages after one more healthy step."""
        if health.finite_steps < limits.warmup_steps:
            return self
        return replace(
            self,
            loss_level=max(self.loss_level, abs(health.loss_ewma)),
            norm_level=max(self.norm_level, health.gradient_norm_ewma),
        )

    def after_epoch(self, epoch: EpochReport) -> Record:
        """With one more epoch's accuracy."""
        return replace(self, best_accuracy=max(self.best_accuracy, epoch.evaluation.accuracy))

    def after_retreat(self, retreat: Retreat, limits: HealthLimits) -> Record:
        """With an automatic rollback taken from the budget; for each that is begun, also one that fails then."""
        return replace(self, budget=self.budget.after(retreat.at_step, limits))


def judge_step(health: Health, record: Record, step: StepReport, limits: HealthLimits) -> Verdict:
    """What to do about a step.

    Args:
        health: the averages before this step.
        record: the run so far.
        step: the step, not observed yet.
        limits: what is not healthy.
    """
    reason = _void_reason(step) or _explosion_reason(health, record, step, limits)
    return _within_budget(ROLLBACK_TIER_FAST, reason, record.budget, step.global_step, limits)


def judge_epoch(record: Record, epoch: EpochReport, limits: HealthLimits) -> Verdict:
    """What to do after an epoch; `record` is the one before it. A job without accuracies never collapses."""
    accuracy = epoch.evaluation.accuracy
    reason = ""
    if record.best_accuracy - accuracy > limits.accuracy_drop:
        reason = f"validation accuracy fell to {accuracy:.3f} from {record.best_accuracy:.3f}"
    return _within_budget(ROLLBACK_TIER_FULL, reason, record.budget, epoch.global_step, limits)


def explosion_limit(average: float, factor: float, level: float) -> float:
    """The value above which something has exploded: `factor` times its average, for an average that is far above zero.

    The distance above the average is measured in the average's size: so it works for averages below zero. Near zero, a
    hundredth of the highest level so far takes its place: what is small for this run is no explosion, in any unit.
    """
    return average + (factor - 1.0) * max(abs(average), _FLOOR * level)


def _void_reason(step: StepReport) -> str:
    if not step.void or step.rescaled:
        return ""
    return f"not finite: loss {step.loss:g}, gradient norm {step.gradient_norm:g}"


def _explosion_reason(health: Health, record: Record, step: StepReport, limits: HealthLimits) -> str:
    if step.void or health.finite_steps < limits.warmup_steps:
        return ""
    limit = explosion_limit(health.loss_ewma, limits.loss_factor, record.loss_level)
    # A loss that swings around zero has an average of no meaning; its deviation has one (Finch 2009, section 9).
    swing = health.loss_ewma + _DEVIATIONS * math.sqrt(health.loss_variance)
    if step.loss > max(limit, swing):
        return f"loss {step.loss:g} exceeds {limits.loss_factor:g} times its average {health.loss_ewma:g}"
    limit = explosion_limit(health.gradient_norm_ewma, limits.norm_factor, record.norm_level)
    # Late in training the norms of a sound run scatter log-normally over far more than that factor: that is no
    # explosion, unless it goes beyond what the whole run has been like.
    scatter = math.exp(health.log_norm_ewma + _LOG_DEVIATIONS * math.sqrt(health.log_norm_variance))
    unheard_of = explosion_limit(record.norm_level, limits.norm_factor, record.norm_level)
    if step.gradient_norm > limit and step.gradient_norm > min(scatter, unheard_of):
        return (
            f"gradient norm {step.gradient_norm:g} exceeds {limits.norm_factor:g} times its average"
            f" {health.gradient_norm_ewma:g}"
        )
    return ""


def _within_budget(
    tier: RollbackTier.ValueType, reason: str, budget: RollbackBudget, at_step: int, limits: HealthLimits
) -> Verdict:
    if not reason:
        return Proceed()
    if budget.spent(at_step, limits):
        spent = f"{limits.rollbacks_max} automatic rollbacks in {limits.per_steps} steps are spent"
        return Halt(f"{reason}; {spent}")
    return Retreat(tier, reason, at_step, RateCut(limits.lr_cut, limits.lr_cut_steps))
