"""How often to take a snapshot: so often that its cost stays a small share of step time. Pure; knows no clock.

The time of the very steps since the last one is what counts, not a step's average: an average that a slow step has
pushed up for a moment would let the next snapshot in too early, over and over again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

OVERHEAD_MAX: Final = 0.01
"""Share of step time that snapshots may cost."""

_WEIGHT_OF_NEWEST: Final = 0.2
"""Of the moving average of costs: follows a change within a dozen snapshots, and one slow one moves it little."""

_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Cadence:
    """What has been measured so far, in seconds: a snapshot's cost, and the steps since the last one.

    Raises:
        ValueError: unless `overhead_max` is positive.
    """

    overhead_max: float = OVERHEAD_MAX
    snapshot_s: float | None = None
    steps_since: int = 0
    stepped_s: float = 0.0

    def __post_init__(self) -> None:
        if self.overhead_max <= 0:
            raise ValueError(f"overhead_max must be positive, got {self.overhead_max}")

    @property
    def due(self) -> bool:
        """Whether to take a snapshot at this fence: none is known, or the steps since the last have paid for one."""
        if self.snapshot_s is None:
            return True
        return self.steps_since > 0 and self.overhead_max * self.stepped_s >= self.snapshot_s * (1 - _ROUNDING)

    def after_step(self, step_s: float) -> Cadence:
        """With one more step, which took `step_s`."""
        return Cadence(self.overhead_max, self.snapshot_s, self.steps_since + 1, self.stepped_s + step_s)

    def after_snapshot(self, snapshot_s: float) -> Cadence:
        """With a snapshot just taken, or declined, at a cost of `snapshot_s`."""
        return replace(self, snapshot_s=_blend(self.snapshot_s, snapshot_s), steps_since=0, stepped_s=0.0)


def _blend(average: float | None, newest: float) -> float:
    return newest if average is None else average + _WEIGHT_OF_NEWEST * (newest - average)
