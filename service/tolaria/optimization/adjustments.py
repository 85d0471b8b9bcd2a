"""Changes of learning rate from outside, and how several at once compose. Pure: no optimizer, no clock.

The rule: the newest living value stands in for the schedule, then the factors that are newer than it multiply, then the
bounds hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tolaria.values.optimization import ActiveAdjustment, Adjustment, in_family


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


def composed(living: Sequence[ActiveAdjustment], group: str, scheduled: float, step: int) -> float:
    """What the adjustments in `living` (oldest first) make of a group's scheduled learning rate; not yet bounded."""
    rate, factor = scheduled, 1.0
    for live in living:
        change = live.adjustment
        if live.expired_at(step) or not change.applies_to(group):
            continue
        if change.value is not None:
            rate, factor = change.value, 1.0  # whoever sets a value means that value: older factors do not bend it
        if change.factor is not None:
            factor *= change.factor
    return rate * factor


def without_replaced(living: Sequence[ActiveAdjustment], new: Adjustment) -> list[ActiveAdjustment]:
    """Those of `living` that still matter beside `new`.

    A lasting value of the same groups ends all that is older.
    """
    if new.value is None or new.expires_after_steps is not None:
        return list(living)
    return [live for live in living if not _covers(new, live.adjustment)]


def _covers(new: Adjustment, old: Adjustment) -> bool:
    return new.group is None or (old.group is not None and in_family(old.group, new.group))
