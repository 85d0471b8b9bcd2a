"""The record of a run's health, which belongs to the run and not to the training state, and rules for judging it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from pydantic import BaseModel, ValidationError

from tolaria.lane.messages import StepDone
from tolaria.rollback.protocol import HEALTH
from tolaria.values.loss_window import relative_spread

APART_STEPS: Final = 16
"""Preferred distance of a restore point from the first sign of an explosion.

A fault that goes on for some steps, such as a wrong learning rate, then shows up again before the place of that sign,
which distinguishes it from a changed task.
"""

EVALUATIONS: Final = 8
"""Evaluations with which new ones are compared, at least 3."""

WATCH_STEPS: Final = 64
"""Steps for which losses that have risen again near the last retreat are watched before the verdict."""

COLLAPSED: Final = 3
"""Evaluations in a row that have to be worse than all of those by more than their range."""

NEAR_STEPS: Final = 64
"""Distance from the place of the last retreat within which losses that rise again may be a changed task."""

REGIMES_MAX: Final = 2
"""Accepted regimes after which finite explosions of the run are only reported: its losses are like that."""

HELD_STEPS: Final = 256
"""Steps taken since an automatic rollback after which it has helped: the next one need not go further back."""

DROPPED_MAX: Final = 8
"""Steps in a row in which the gradients of a seed are dropped, after which it is culled."""


class AutomaticRollback(BaseModel):
    """An automatic rollback: the step at which it began, and the one that it restored (None until then).

    `origin` is `health` or `tamiyo`; `begun_after` the steps taken before it. Earlier versions recorded neither.
    """

    begun_at: int
    begun_after: int | None = None
    origin: str = HEALTH
    restored_step: int | None = None


class Record(BaseModel):
    """What belongs to the run and not to the training state.

    Attributes:
        rollbacks: automatic ones, of all origins, within `rollback.per_steps`.
        rolled_back_at: the steps at which they began, as an earlier version recorded them.
        retreat_step: first step of the evidence of the last retreat from an explosion; None if there was none.
        retreat_batches: the batches that the last retreat left out.
        left_out: all batches that are left out, as (epoch, place).
        taken: steps taken in all, also those that were undone.
        best_step: the highest step so far.
        best_step_then: `best_step` at the last automatic rollback.
        without_progress: automatic rollbacks in a row at the same `best_step`.
        skip_streak: steps in a row that were skipped most recently.
        skipped: steps that were skipped in all.
        regimes: accepted regimes.
        trends: `slow` after a retreat from a slow rise, `evaluations` after one from worse validation losses. Losses of
            adversaries or of growing targets rise like that by themselves: the next such rise does not roll back.
        counts_accuracy: whether the job counts correct predictions; evaluations are accuracies then, else -losses.
        judged_by: the job's metric that evaluations are values of, as `checkpoint.best` names it; empty: as above.
        evaluations: step and value of the last healthy evaluations; larger values are better.
        worse: the same of the evaluations in a row that were worse than all of those.
    """

    rollbacks: list[AutomaticRollback] = []
    rolled_back_at: list[int] = []
    retreat_step: int | None = None
    retreat_batches: list[tuple[int, int]] = []
    left_out: list[tuple[int, int]] = []
    taken: int = 0
    best_step: int = 0
    best_step_then: int = -1
    without_progress: int = 0
    skip_streak: int = 0
    skipped: int = 0
    regimes: int = 0
    trends: list[str] = []
    counts_accuracy: bool = False
    judged_by: str = ""
    evaluations: list[tuple[int, float]] = []
    worse: list[tuple[int, float]] = []

    @classmethod
    def parse(cls, saved: str) -> Record:
        """Returns the record of `Health.to_json`; a new one if the text is empty or unreadable."""
        try:
            record = cls.model_validate_json(saved) if saved else cls()
        except ValidationError:
            return cls()
        record.rollbacks += [AutomaticRollback(begun_at=step) for step in record.rolled_back_at]
        record.rolled_back_at = []
        return record


@dataclass(slots=True)
class Watch:
    """Losses that have risen again near the last retreat, until it is known whether the task has changed.

    `early`: before the place of that retreat, on data on which training went well then. `trend`: that of
    `Record.trends` which they are, if any.
    """

    reason: str
    evidence_step: int
    batches: tuple[tuple[int, int], ...]
    limit: float
    spread_before: float
    early: bool
    trend: str
    losses: list[float]

    @property
    def healed(self) -> bool:
        """Whether the losses have fallen again by themselves."""
        latest = self.losses[WATCH_STEPS // 2 :]
        return not self.early and sum(loss > self.limit for loss in latest) <= len(latest) // 2

    def longer(self) -> Watch:
        """Returns a watch of further steps, which forgets the first half of the losses."""
        return replace(self, losses=self.losses[len(self.losses) // 2 :])


class DroppedSeeds:
    """Counts the steps in a row in which the gradients of an isolated seed were not finite and were dropped."""

    def __init__(self) -> None:
        self._streaks: dict[str, int] = {}

    def after(self, step: StepDone) -> list[str]:
        """Returns the seeds that are to be culled because of this step; a skipped one changes nothing."""
        if step.skipped:
            return []
        self._streaks = {seed_id: self._streaks.get(seed_id, 0) + 1 for seed_id in step.dropped_seeds}
        return [seed_id for seed_id, streak in self._streaks.items() if streak == DROPPED_MAX]


def batches_of(step: StepDone) -> tuple[tuple[int, int], ...]:
    """Returns the batches of a step, as (epoch, place)."""
    return tuple((step.epoch, place) for place in step.batches)


def apart(evidence_step: int) -> int:
    """Returns the step that a restore point should precede: `APART_STEPS` before the first sign, but at least 1."""
    return max(min(evidence_step, 1), evidence_step - APART_STEPS + 1)


def stable(losses: list[float], spread_before: float, scale: float) -> bool:
    """Whether losses have found a new level: they scatter no more than before relative to it, or they fall."""
    half = len(losses) // 2
    earlier, later = sorted(losses[:half]), sorted(losses[half:])
    falling = later[-1] <= earlier[-1] and later[half // 2] < earlier[half // 2]
    return falling or relative_spread(losses, scale) <= spread_before


def collapsing(before: list[float], value: float, drop: float) -> bool:
    """Whether an evaluation is worse than all of the last eight, or at least three, by more than their range.

    The range is at least `drop` times the magnitude of the best one: at the end of training it may be zero.
    """
    if len(before) < COLLAPSED:
        return False
    best, worst = max(before), min(before)
    return not value >= worst - max(best - worst, drop * abs(best))
