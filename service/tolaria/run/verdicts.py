"""The verdicts of health: what a step or an epoch of training calls for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from tolaria.emergency import Trigger
from tolaria.lane.messages import AcceptRegime


@dataclass(frozen=True, slots=True)
class Proceed:
    """Training goes on. `alarm` is an explosion or a trend that is only reported, empty for none."""

    alarm: str = ""


@dataclass(frozen=True, slots=True)
class RateCut:
    """Multiplies the learning rate by `factor` for `steps` steps; includes the cuts that the rollback undoes."""

    factor: float
    steps: int


@dataclass(frozen=True, slots=True)
class Retreat:
    """Training has to be rolled back to the newest proven restore point before `evidence_step`.

    Attributes:
        reason: what went wrong.
        evidence_step: the first step that shows it; the restore point has to be of an earlier step.
        batches: those of the evidence, as (epoch, place), which are left out from now on.
        cut: of the learning rate.
        older_than: the point has to be of an earlier step than this too: the one that the previous automatic rollback
            restored. None if there was none within `HELD_STEPS`.
        durable: whether only checkpoints are considered.
        preferred_before: a point of an earlier step than this is better, from before the losses began to rise.
        trend: the evidence is only a trend of `Record.trends`: without a restore point, training goes on.
    """

    reason: str
    evidence_step: int
    batches: tuple[tuple[int, int], ...]
    cut: RateCut
    older_than: int | None = None
    durable: bool = False
    preferred_before: int | None = None
    trend: bool = False

    @property
    def at_or_before(self) -> int:
        """The newest step that a restore point may be of; -1 if there can be none."""
        before = self.evidence_step if self.older_than is None else min(self.evidence_step, self.older_than)
        return before - 1


@dataclass(frozen=True, slots=True)
class Halt:
    """Training has to be frozen: going on would repeat what went wrong."""

    trigger: Trigger
    reason: str


Verdict: TypeAlias = Proceed | AcceptRegime | Retreat | Halt
