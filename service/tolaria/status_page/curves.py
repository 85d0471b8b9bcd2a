"""Curves of bounded size over the steps of a run, which keep the extremes, and forget steps that are rolled back."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

POINTS_MAX: Final = 300
"""Points of a curve: about one for each two or three pixels of a chart."""

RECENT_MAX: Final = 1024
"""Latest values that are kept as they are, so that a point can be cut exactly where a rollback restores a step."""

GROUPS_MAX: Final = 12
"""Groups of parameters with a curve of their learning rate."""

OWN_CURVES_MAX: Final = 24
"""Metrics of the job with a curve, for evaluations and for steps each."""

_CURVES_MAX: Final = {"rate": GROUPS_MAX, "evaluation": OWN_CURVES_MAX, "step": OWN_CURVES_MAX}
_OWN_POINTS: Final = 150


@dataclass(slots=True)
class CurvePoint:
    """The values of the steps from `first` to `last`: the lowest, the highest, their sum and number."""

    first: int
    last: int
    low: float
    high: float
    total: float
    count: int

    @classmethod
    def of(cls, step: int, value: float) -> CurvePoint:
        """Returns the point of one value."""
        return cls(step, step, value, value, value, 1)

    @property
    def mean(self) -> float:
        """The mean of the values; the lowest if their sum is too large for a float."""
        mean = self.total / self.count
        return mean if math.isfinite(mean) else self.low

    def merge(self, later: CurvePoint) -> None:
        """Takes in the values of a later point."""
        self.last = later.last
        self.low, self.high = min(self.low, later.low), max(self.high, later.high)
        self.total += later.total
        self.count += later.count

    def encoded(self) -> str:
        """Returns [first, last, lowest, highest, mean] as JSON, values with six digits."""
        return f"[{self.first},{self.last},{self.low:.6g},{self.high:.6g},{self.mean:.6g}]"


class Curve:
    """The values of one figure by step. Adding one takes about a microsecond; memory is bounded.

    A point covers `span` steps, a power of two that doubles whenever there are too many points.

    Attributes:
        points: in the order of their steps. All but the last one stay as they are until `revision` changes.
        revision: rises when earlier points have changed.
    """

    def __init__(self, points_max: int = POINTS_MAX) -> None:
        self.points: list[CurvePoint] = []
        self.revision = 0
        self._points_max = points_max
        self._span = 1
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_MAX)

    def add(self, step: int, value: float) -> None:
        """Adds a value at a step that is not before the last one; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._recent.append((step, value))
        self._append(step, value)
        if len(self.points) > self._points_max:
            self._condense()

    def rewind(self, step: int) -> None:
        """Removes all values of later steps.

        Of a point that covers earlier steps too, those remain that are among the latest values.
        """
        while self._recent and self._recent[-1][0] > step:
            self._recent.pop()
        if not self.points or self.points[-1].last <= step:
            return
        self.revision += 1
        while self.points and self.points[-1].last > step:
            removed = self.points.pop()
        if removed.first <= step:
            for kept, value in self._recent:
                if kept >= removed.first:
                    self._append(kept, value)

    def _append(self, step: int, value: float) -> None:
        if self.points and self.points[-1].first // self._span == step // self._span:
            last = self.points[-1]
            last.last = step
            last.total += value
            last.count += 1
            if value < last.low:
                last.low = value
            elif value > last.high:
                last.high = value
        else:
            self.points.append(CurvePoint.of(step, value))

    def _condense(self) -> None:
        """Doubles the span until at most three quarters of the points are left."""
        self.revision += 1
        while len(self.points) > self._points_max * 3 // 4:
            self._span *= 2
            merged = self.points[:1]
            for point in self.points[1:]:
                if merged[-1].first // self._span == point.first // self._span:
                    merged[-1].merge(point)
                else:
                    merged.append(point)
            self.points = merged


class CurveSet(dict[str, Curve]):
    """The curves of a run by name, in the order in which they began: a bounded number of each kind.

    `loss`, `validation_loss`, `accuracy` and `boundary_ms`; `rate/GROUP`; and metrics of the job as `evaluation/NAME`
    and `step/NAME`.
    """

    def __init__(self) -> None:
        super().__init__({name: Curve() for name in ("loss", "validation_loss", "accuracy", "boundary_ms")})

    def add(self, name: str, step: int, value: float) -> None:
        """Adds a value to a curve, which is begun unless there are enough of its kind."""
        if name not in self:
            kind = name.partition("/")[0]
            if sum(known.startswith(f"{kind}/") for known in self) >= _CURVES_MAX[kind]:
                return
            self[name] = Curve(_OWN_POINTS)
        self[name].add(step, value)

    def rewind(self, step: int) -> None:
        """Removes all values of later steps."""
        for curve in self.values():
            curve.rewind(step)

    @property
    def first_step(self) -> int | None:
        """The first step with a value; None without any."""
        return min((curve.points[0].first for curve in self.values() if curve.points), default=None)


class EncodedCurve:
    """The points of a curve as JSON, each encoded once, and which of them are new since the last call."""

    def __init__(self, curve: Curve) -> None:
        self._curve = curve
        self._texts: list[str] = []
        self._revision = curve.revision

    def changes(self) -> str:
        """Returns what has changed since the last call, as an object in JSON; an empty text if nothing has.

        `at` is the number of earlier points that are as before; `points` replaces the others.
        """
        at = max(0, len(self._texts) - 1) if self._revision == self._curve.revision else 0
        fresh = [point.encoded() for point in self._curve.points[at:]]
        if self._revision == self._curve.revision and fresh == self._texts[at:]:
            return ""
        self._revision = self._curve.revision
        self._texts[at:] = fresh
        return _encoded(at, fresh)

    def whole(self) -> str:
        """Returns the points of the last call of `changes`, as such an object."""
        return _encoded(0, self._texts)


def _encoded(at: int, points: list[str]) -> str:
    return f'{{"at":{at},"points":[{",".join(points)}]}}'
