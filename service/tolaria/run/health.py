"""The health of training: averages, limits, the budget of automatic rollbacks, and the verdict on each step and epoch.

A step is judged against the averages of the steps before it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Final, TypeAlias

from pydantic import BaseModel, ValidationError

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, RollbackTier
from tolaria.config import RollbackSettings
from tolaria.lane.messages import EpochDone, StepDone

EWMA_WEIGHT: Final = 0.05
"""Weight of the newest step in the moving averages: about the last twenty steps count."""

_FLOOR: Final = 0.01
_DEVIATIONS: Final = 6.0
_LOG_DEVIATIONS: Final = 5.0
_NORM_MIN: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Proceed:
    """Training goes on."""


@dataclass(frozen=True, slots=True)
class RateCut:
    """Multiplies the learning rate by `factor` for `steps` steps."""

    factor: float
    steps: int


@dataclass(frozen=True, slots=True)
class Retreat:
    """Training has to be rolled back to the newest proven restore point before `evidence_step`."""

    reason: str
    evidence_step: int
    batches: tuple[tuple[int, int], ...]
    cut: RateCut
    older_than: int | None = None
    durable: bool = False

    @property
    def at_or_before(self) -> int:
        """The newest step that a restore point may be of; -1 if there can be none."""
        before = self.evidence_step if self.older_than is None else min(self.evidence_step, self.older_than)
        return before - 1


@dataclass(frozen=True, slots=True)
class Halt:
    """Training has to be frozen: going on would repeat what went wrong."""

    reason: str


Verdict: TypeAlias = Proceed | Retreat | Halt


@dataclass(frozen=True, slots=True)
class Averages:
    """Exponentially weighted averages and variances over finite steps (Finch 2009, section 9).

    The logarithm of the gradient norm is averaged as well, since norms vary by factors. `skipped_streak` is the number
    of consecutive steps that have been skipped most recently.
    """

    loss: float = 0.0
    loss_variance: float = 0.0
    gradient_norm: float = 0.0
    gradient_norm_variance: float = 0.0
    log_norm: float = 0.0
    log_norm_variance: float = 0.0
    loss_delta: float = 0.0
    finite_steps: int = 0
    skipped_streak: int = 0

    def after(self, step: StepDone) -> Averages:
        """Returns the averages with one more step."""
        if step.rescaled:
            return self
        if step.skipped:
            return replace(self, skipped_streak=self.skipped_streak + 1)
        log_norm = math.log(max(step.gradient_norm, _NORM_MIN))
        if self.finite_steps == 0:
            return Averages(loss=step.loss, gradient_norm=step.gradient_norm, log_norm=log_norm, finite_steps=1)
        loss, loss_variance = _blend(self.loss, self.loss_variance, step.loss)
        norm, norm_variance = _blend(self.gradient_norm, self.gradient_norm_variance, step.gradient_norm)
        log, log_variance = _blend(self.log_norm, self.log_norm_variance, log_norm)
        return Averages(
            loss=loss,
            loss_variance=loss_variance,
            gradient_norm=norm,
            gradient_norm_variance=norm_variance,
            log_norm=log,
            log_norm_variance=log_variance,
            loss_delta=step.loss - self.loss,
            finite_steps=self.finite_steps + 1,
        )


@dataclass(frozen=True, slots=True)
class RollbackBudget:
    """Steps at which automatic rollbacks began. A rollback undoes steps but restores none of the budget."""

    begun_at: tuple[int, ...] = ()

    def spent(self, at_step: int, settings: RollbackSettings) -> bool:
        """Whether no further automatic rollback is allowed at `at_step`. Rollbacks at later, undone steps count too."""
        return sum(step > at_step - settings.per_steps for step in self.begun_at) >= settings.automatic_max

    def after(self, at_step: int, settings: RollbackSettings) -> RollbackBudget:
        """Returns the budget with one more rollback, begun at `at_step`."""
        return RollbackBudget(tuple(sorted((*self.begun_at, at_step))[-settings.automatic_max :]))


@dataclass(frozen=True, slots=True)
class Record:
    """The history by which new steps and epochs are judged. Not part of the training state.

    `loss_level` and `norm_level` are the highest values of the moving averages since the warm-up.
    """

    loss_level: float = 0.0
    norm_level: float = 0.0
    best_accuracy: float = 0.0
    budget: RollbackBudget = RollbackBudget()

    def after_step(self, averages: Averages, settings: RollbackSettings) -> Record:
        """Returns the record with the averages after one more healthy step."""
        if averages.finite_steps < settings.warmup_steps:
            return self
        return replace(
            self,
            loss_level=max(self.loss_level, abs(averages.loss)),
            norm_level=max(self.norm_level, averages.gradient_norm),
        )

    def after_epoch(self, epoch: EpochDone) -> Record:
        """Returns the record with the accuracy of one more epoch."""
        return replace(self, best_accuracy=max(self.best_accuracy, epoch.evaluation.accuracy))

    def after_retreat(self, retreat: Retreat, settings: RollbackSettings) -> Record:
        """Returns the record with one more automatic rollback begun."""
        return replace(self, budget=self.budget.after(retreat.evidence_step, settings))


def judge_step(averages: Averages, record: Record, step: StepDone, settings: RollbackSettings) -> Verdict:
    """Returns what to do about a step, given the averages and the record before it."""
    if step.skipped:
        # A rescaled step only had too high a loss scale for float16.
        reason = "" if step.rescaled else f"not finite: loss {step.loss:g}, gradient norm {step.gradient_norm:g}"
    else:
        reason = _explosion(averages, record, step, settings)
    return _within_budget(ROLLBACK_TIER_FAST, reason, record.budget, step.global_step, settings)


def judge_epoch(record: Record, epoch: EpochDone, settings: RollbackSettings) -> Verdict:
    """Returns what to do after an epoch, given the record before it. A job without accuracies always passes."""
    accuracy = epoch.evaluation.accuracy
    reason = ""
    if record.best_accuracy - accuracy > settings.accuracy_drop:
        reason = f"validation accuracy fell to {accuracy:.3f} from {record.best_accuracy:.3f}"
    return _within_budget(ROLLBACK_TIER_FULL, reason, record.budget, epoch.global_step, settings)


class Health:
    """Judges steps and epochs of one run, if the settings enable it. Used on the event loop only.

    `saved` is the JSON from `to_json` of an earlier process of the run; empty for a new run.
    """

    def __init__(self, settings: RollbackSettings, saved: str = "") -> None:
        self._settings = settings
        self._record = _parse(saved)
        self._retreating = False
        self._spoiled: set[tuple[int, int]] = set()
        self._validated_step: int | None = None
        self.averages = Averages()
        self.above = self.suspect = False
        self.healthy_step: int | None = None
        """The newest step that was judged healthy; None before the first."""

    def to_json(self) -> str:
        """Returns the record by which steps and epochs are judged; a resumed run continues with it."""
        saved = asdict(self._record)
        saved["rolled_back_at"] = saved.pop("budget")["begun_at"]
        return json.dumps(saved)

    def step(self, step: StepDone, *, rolling_back: bool) -> Verdict:
        """Judges a step and counts it in the averages if it is healthy or skipped.

        While a rollback is in progress no other one begins, but the batches of unhealthy steps are still recorded.
        """
        quiet = rolling_back or self._retreating
        verdict = self._judge_step(step, quiet=quiet)
        healthy = isinstance(verdict, Proceed) and not quiet
        if healthy or step.skipped:
            self.averages = self.averages.after(step)
        if healthy:
            self._record = self._record.after_step(self.averages, self._settings)
        return verdict

    def epoch(self, epoch: EpochDone, *, rolling_back: bool) -> Verdict:
        """Judges the validation accuracy of an epoch against the best one before it, unless a rollback is under way."""
        if not self._settings.automatic or rolling_back or self._retreating:
            return Proceed()
        verdict = judge_epoch(self._record, epoch, self._settings)
        if isinstance(verdict, Retreat) and self._validated_step is not None:
            verdict = replace(verdict, evidence_step=self._validated_step + 1)
        self._record = self._record.after_epoch(epoch)
        if isinstance(verdict, Proceed):
            self._validated_step = epoch.global_step
        elif self._validated_step is not None and self.healthy_step is not None:
            self.healthy_step = min(self._validated_step, self.healthy_step)
        return self._begin(verdict)

    def skipped_too_many(self, skipped_max: int) -> bool:
        """Whether at least `skipped_max` steps in a row were skipped."""
        return self.averages.skipped_streak >= skipped_max

    def forgive_skipped_steps(self) -> None:
        """Resets the streak of skipped steps."""
        self.averages = replace(self.averages, skipped_streak=0)

    def end_retreat(self) -> tuple[tuple[int, int], ...]:
        """Ends a rollback; returns the batches, as (epoch, place), of the unhealthy steps since it was requested."""
        spoiled, self._spoiled = tuple(sorted(self._spoiled)), set()
        self._retreating = False
        return spoiled

    def _judge_step(self, step: StepDone, *, quiet: bool) -> Verdict:
        if not self._settings.automatic:
            return Proceed()
        verdict = judge_step(self.averages, self._record, step, self._settings)
        if isinstance(verdict, Proceed):
            if not (step.skipped or quiet):
                self.healthy_step = step.global_step
            return verdict
        self._spoiled.update((step.epoch, place) for place in step.batches)
        return Proceed() if quiet else self._begin(verdict)

    def _begin(self, verdict: Verdict) -> Verdict:
        if isinstance(verdict, Retreat):
            self._record = self._record.after_retreat(verdict, self._settings)
            self._retreating = True
        return verdict


def explosion_limit(average: float, factor: float, level: float) -> float:
    """Returns the limit above which a value has exploded: `factor` times its average if that is not near zero.

    The margin above the average is proportional to the average's magnitude, so that negative averages work too. Near
    zero, a hundredth of the highest level so far replaces the magnitude.
    """
    return average + (factor - 1.0) * max(abs(average), _FLOOR * level)


def _explosion(averages: Averages, record: Record, step: StepDone, settings: RollbackSettings) -> str:
    if averages.finite_steps < settings.warmup_steps:
        return ""
    limit = explosion_limit(averages.loss, settings.loss_factor, record.loss_level)
    # For a loss around zero, its ratio to the average is meaningless; its deviation is not.
    swing = averages.loss + _DEVIATIONS * math.sqrt(averages.loss_variance)
    if step.loss > max(limit, swing):
        return f"loss {step.loss:g} exceeds {settings.loss_factor:g} times its average {averages.loss:g}"
    limit = explosion_limit(averages.gradient_norm, settings.norm_factor, record.norm_level)
    # Late in training, the norms of a healthy run vary log-normally by far more than that factor.
    scatter = math.exp(averages.log_norm + _LOG_DEVIATIONS * math.sqrt(averages.log_norm_variance))
    beyond_record = explosion_limit(record.norm_level, settings.norm_factor, record.norm_level)
    if step.gradient_norm > limit and step.gradient_norm > min(scatter, beyond_record):
        norms = f"{settings.norm_factor:g} times its average {averages.gradient_norm:g}"
        return f"gradient norm {step.gradient_norm:g} exceeds {norms}"
    return ""


def _within_budget(
    tier: RollbackTier.ValueType, reason: str, budget: RollbackBudget, at_step: int, settings: RollbackSettings
) -> Verdict:
    if not reason:
        return Proceed()
    if budget.spent(at_step, settings):
        spent = f"{settings.automatic_max} automatic rollbacks in {settings.per_steps} steps are spent"
        return Halt(f"{reason}; {spent}")
    cut = RateCut(settings.lr_cut, settings.lr_cut_steps)
    return Retreat(reason, at_step, (), cut, durable=tier == ROLLBACK_TIER_FULL)


def _blend(average: float, variance: float, value: float) -> tuple[float, float]:
    off = value - average
    return average + EWMA_WEIGHT * off, (1.0 - EWMA_WEIGHT) * (variance + EWMA_WEIGHT * off * off)


class _SavedRecord(BaseModel):
    loss_level: float = 0.0
    norm_level: float = 0.0
    best_accuracy: float = 0.0
    rolled_back_at: list[int] = []


def _parse(saved: str) -> Record:
    """Returns the record of `Health.to_json`; a new one if the text is empty or unreadable."""
    try:
        found = _SavedRecord.model_validate_json(saved) if saved else _SavedRecord()
    except ValidationError:
        found = _SavedRecord()
    return Record(found.loss_level, found.norm_level, found.best_accuracy, RollbackBudget(tuple(found.rolled_back_at)))
