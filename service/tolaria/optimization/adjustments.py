"""Changes of learning rate from outside, and how several at once compose. Pure: no optimizer, no clock.

The rule: the newest living value stands in for the schedule, then the factors that are newer than it multiply, then the
bounds hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tolaria.errors import AdjustmentRefusedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """One change of learning rate, by exactly one of `factor` and `value`.

    Args:
        group: name of a param group, or of a family of them ("host" stands for "host/0" and "host/1" too);
            None: all that train.
        factor: multiplies, above 0.
        value: replaces what the schedule says, at least 0.
        expires_after_steps: updates it lasts for, at least 1; None: until taken back or replaced.
        origin: who asked, such as "operator", "tamiyo" or "rollback".
        request_id: the request's own id.
        reason: for the audit trail.

    Raises:
        AdjustmentRefusedError: naming the field that makes no sense by itself.
    """

    group: str | None
    factor: float | None = None
    value: float | None = None
    expires_after_steps: int | None = None
    origin: str
    request_id: str
    reason: str

    def __post_init__(self) -> None:
        if (self.factor is None) == (self.value is None):
            raise AdjustmentRefusedError("factor", "exactly one of factor and value is needed")
        if self.factor is not None and not (math.isfinite(self.factor) and self.factor > 0.0):
            raise AdjustmentRefusedError("factor", f"must be a finite number above 0, is {self.factor}")
        if self.value is not None and not (math.isfinite(self.value) and self.value >= 0.0):
            raise AdjustmentRefusedError("value", f"must be a finite number not below 0, is {self.value}")
        if self.expires_after_steps is not None and self.expires_after_steps < 1:
            raise AdjustmentRefusedError("expires_after_steps", f"must be at least 1, is {self.expires_after_steps}")

    def concerns(self, group: str) -> bool:
        """Whether it means this param group."""
        return self.group is None or in_family(group, self.group)


@dataclass(frozen=True, slots=True)
class LiveAdjustment:
    """An adjustment and the global step from which it holds."""

    adjustment: Adjustment
    at_step: int

    def over_at(self, step: int) -> bool:
        """Whether it has expired by then."""
        lasts = self.adjustment.expires_after_steps
        return lasts is not None and step >= self.at_step + lasts


@dataclass(frozen=True, slots=True, kw_only=True)
class Retraction:
    """Taking back a living adjustment before it expires. `request_id` is the retraction's own."""

    origin: str
    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class AdjustmentRecord:
    """A line of the audit trail: what was asked, when, and what it did to the rates of the groups it meant.

    With `retraction` the adjustment was taken back at that step rather than made.
    """

    adjustment: Adjustment
    at_step: int
    before: dict[str, float]
    after: dict[str, float]
    retraction: Retraction | None = None


def in_family(group: str, family: str) -> bool:
    """Whether `group` is `family` itself or one of its numbered members ("host/1" of "host")."""
    return group == family or group.startswith(family + "/")


def composed(living: Sequence[LiveAdjustment], group: str, scheduled: float, step: int) -> float:
    """What the adjustments in `living` (oldest first) make of a group's scheduled learning rate; not yet bounded."""
    rate, factor = scheduled, 1.0
    for live in living:
        change = live.adjustment
        if live.over_at(step) or not change.concerns(group):
            continue
        if change.value is not None:
            rate, factor = change.value, 1.0  # whoever sets a value means that value: older factors do not bend it
        if change.factor is not None:
            factor *= change.factor
    return rate * factor


def without_replaced(living: Sequence[LiveAdjustment], new: Adjustment) -> list[LiveAdjustment]:
    """Those of `living` that still matter beside `new`.

    A lasting value of the same groups ends all that is older.
    """
    if new.value is None or new.expires_after_steps is not None:
        return list(living)
    return [live for live in living if not _covers(new, live.adjustment)]


def _covers(new: Adjustment, old: Adjustment) -> bool:
    return new.group is None or (old.group is not None and in_family(old.group, new.group))
