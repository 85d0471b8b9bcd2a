"""How often to take a snapshot: so often that its cost stays a small share of step time. Pure; knows no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

OVERHEAD_MAX: Final = 0.01
"""Share of step time that snapshots may cost."""

_WEIGHT_OF_NEWEST: Final = 0.2
"""Of the moving averages: follows a change within a dozen measurements, and one slow step moves it little."""


@dataclass(frozen=True, slots=True)
class Cadence:
    """What has been measured so far, in seconds, and how many steps have been done since the last snapshot."""

    overhead_max: float = OVERHEAD_MAX
    snapshot_s: float | None = None
    step_s: float | None = None
    steps_since: int = 0

    @property
    def interval_steps(self) -> int:
        """Steps from one snapshot to the next; 1 as long as nothing is known."""
        if self.snapshot_s is None or self.step_s is None:
            return 1
        return interval_steps(self.snapshot_s, self.step_s, self.overhead_max)

    @property
    def due(self) -> bool:
        """Whether to take a snapshot at this fence."""
        return self.snapshot_s is None or self.steps_since >= self.interval_steps

    def after_step(self, step_s: float) -> Cadence:
        """With one more step, which took `step_s`."""
        return replace(self, step_s=_blend(self.step_s, step_s), steps_since=self.steps_since + 1)

    def after_snapshot(self, snapshot_s: float) -> Cadence:
        """With a snapshot just taken, or declined, at a cost of `snapshot_s`."""
        return replace(self, snapshot_s=_blend(self.snapshot_s, snapshot_s), steps_since=0)


def interval_steps(snapshot_s: float, step_s: float, overhead_max: float) -> int:
    """The least number of steps, at least 1, over which a snapshot costs at most `overhead_max` of their time.

    Raises:
        ValueError: unless `overhead_max` is positive.
    """
    if overhead_max <= 0:
        raise ValueError(f"overhead_max must be positive, got {overhead_max}")
    if step_s <= 0:
        return 1
    return max(1, math.ceil(snapshot_s / (overhead_max * step_s) * (1 - 1e-12)))


def _blend(average: float | None, newest: float) -> float:
    return newest if average is None else average + _WEIGHT_OF_NEWEST * (newest - average)
