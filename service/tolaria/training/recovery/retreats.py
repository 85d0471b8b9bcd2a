"""Watches a run's health and says when it has to go back by itself; remembers which batches have spoiled it meanwhile.

Owns the record that steps are judged against. Must not know how a rollback is done.
"""

from __future__ import annotations

import json

from pydantic import BaseModel, ValidationError

from tolaria.config import RollbackSettings
from tolaria.training.judge import Health, Proceed
from tolaria.training.reports import EpochReport, StepReport
from tolaria.training.verdicts import (
    HealthLimits,
    Record,
    Retreat,
    RollbackBudget,
    Verdict,
    judge_epoch,
    judge_step,
)


class Retreats:
    """Used on the event loop only.

    Args:
        settings: limits, and whether anything is done at all.
        scale: what `scale` told in an earlier process of the run; empty for a new one.
    """

    def __init__(self, settings: RollbackSettings, scale: str = "") -> None:
        self._automatic = settings.automatic
        self._limits = limits_of(settings)
        self._record = _read(scale)
        self._retreating = False
        self._spoiled: set[tuple[int, int]] = set()
        self._validated_step: int | None = None
        self.healthy_step: int | None = None
        """The newest step that was judged and found well, by its epoch too where that is over; None: none was."""

    @property
    def scale(self) -> str:
        """What steps and epochs are measured against, as JSON: a run that is resumed goes on with it."""
        record = self._record
        levels = {
            "loss_level": record.loss_level,
            "norm_level": record.norm_level,
            "best_accuracy": record.best_accuracy,
            "rolled_back_at": list(record.budget.begun_at),
        }
        return json.dumps(levels)

    def step(self, step: StepReport, health: Health) -> Verdict:
        """Judge a step against the averages before it. While going back nothing is begun, but spoilt steps count."""
        if not self._automatic:
            return Proceed()
        verdict = judge_step(health, self._record, step, self._limits)
        if isinstance(verdict, Proceed):
            if not (step.void or self._retreating):
                self.healthy_step = step.global_step
            return verdict
        self._spoiled.update((step.epoch, place) for place in step.batches)
        if self._retreating:
            return Proceed()
        return self._begun(verdict)

    def observed(self, health: Health) -> None:
        """A healthy step has entered the averages."""
        self._record = self._record.after_step(health, self._limits)

    def epoch(self, epoch: EpochReport) -> Verdict:
        """Judge an epoch against the best before it."""
        if not self._automatic or self._retreating:
            return Proceed()
        verdict = judge_epoch(self._record, epoch, self._limits)
        self._record = self._record.after_epoch(epoch)
        if isinstance(verdict, Proceed):
            self._validated_step = epoch.global_step
            return verdict
        if self._validated_step is not None and self.healthy_step is not None:
            self.healthy_step = min(self._validated_step, self.healthy_step)
        return self._begun(verdict)

    def over(self) -> frozenset[tuple[int, int]]:
        """A rollback has ended: the batches, (epoch, place in it), that were spoilt since it was asked for."""
        spoiled, self._spoiled = frozenset(self._spoiled), set()
        self._retreating = False
        return spoiled

    def _begun(self, verdict: Verdict) -> Verdict:
        if isinstance(verdict, Retreat):
            self._record = self._record.after_retreat(verdict, self._limits)
            self._retreating = True
        return verdict


def limits_of(settings: RollbackSettings) -> HealthLimits:
    """The judge's limits as the settings have them."""
    return HealthLimits(
        loss_factor=settings.loss_factor,
        norm_factor=settings.norm_factor,
        accuracy_drop=settings.accuracy_drop,
        warmup_steps=settings.warmup_steps,
        rollbacks_max=settings.automatic_max,
        per_steps=settings.per_steps,
        lr_cut=settings.lr_cut,
        lr_cut_steps=settings.lr_cut_steps,
    )


def _read(scale: str) -> Record:
    """The record that `scale` told; a new one where that is nothing, or nothing that can be read."""
    try:
        levels = _Levels.model_validate_json(scale) if scale else _Levels()
    except ValidationError:
        levels = _Levels()
    return Record(
        levels.loss_level, levels.norm_level, levels.best_accuracy, RollbackBudget(tuple(levels.rolled_back_at))
    )


class _Levels(BaseModel):
    loss_level: float = 0.0
    norm_level: float = 0.0
    best_accuracy: float = 0.0
    rolled_back_at: list[int] = []
