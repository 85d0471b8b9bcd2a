"""The figures of an epoch's steps, the pace of a run, and from it the time that the run still takes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Final

from tolaria.lane.messages import EpochDone, StepDone

_STEPS: Final = 256
_STEPS_NEEDED: Final = 8


@dataclass(slots=True)
class EpochSums:
    """Sums over the steps of the current epoch; skipped steps contribute only their number, samples and time."""

    steps: int = 0
    skipped_steps: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    gradient_norm: float = 0.0
    duration_s: float = 0.0
    input_wait_s: float = 0.0
    copy_s: float = 0.0

    def add(self, step: StepDone) -> None:
        """Counts one step."""
        self.duration_s += step.duration_s
        self.input_wait_s += step.input_wait_s
        self.copy_s += step.copy_s
        self.samples += step.samples
        if step.skipped:
            self.skipped_steps += 1
            return
        self.steps += 1
        self.loss_sum += step.loss
        self.gradient_norm = step.gradient_norm

    @property
    def loss(self) -> float:
        """Mean loss of the finite steps; NaN before the first."""
        return self.loss_sum / self.steps if self.steps else float("nan")

    @property
    def samples_per_s(self) -> float:
        """Samples per second of step time; 0 before the first step."""
        return self.samples / self.duration_s if self.duration_s else 0.0


@dataclass(slots=True)
class Pace:
    """How long recent steps took, and what followed the last ones of epochs: evaluation, boundary, checkpoint.

    In seconds. The median of the latter counts, so that a pause of an operator's does not.
    """

    _steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS))
    _ends_s: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    _evaluation_s: float = 0.0
    """Of the last epoch: what is known before the first step that follows one."""
    _last_s: float = 0.0
    _over: bool = False

    def step(self, step: StepDone) -> None:
        """Counts a step; a skipped one takes time, but brings the end no nearer."""
        if self._over:
            self._ends_s.append(max(0.0, step.finished_at_s - step.duration_s - self._last_s))
        self._over = False
        self._steps_s.append(step.duration_s)
        self._last_s = step.finished_at_s

    def epoch(self, epoch: EpochDone) -> None:
        """Counts the evaluation of an epoch, which followed its last step; what else does ends with the next step."""
        if self._last_s:
            self._over = True
            self._evaluation_s = max(0.0, epoch.finished_at_s - self._last_s)

    def remaining_s(self, steps: int, epochs: float) -> float | None:
        """Returns the time that further steps and ends of epochs take; None until some steps are known."""
        if len(self._steps_s) < _STEPS_NEEDED:
            return None
        ends_s = median(self._ends_s) if self._ends_s else self._evaluation_s
        return max(0, steps) * fmean(self._steps_s) + max(0.0, epochs) * ends_s
