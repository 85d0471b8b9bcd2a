"""Composition of learning-rate adjustments.

The newest active value replaces the scheduled rate, then the factors that are newer than the value multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tolaria.values.optimization import ActiveAdjustment, Adjustment, in_family


@dataclass(frozen=True, slots=True)
class RateChange:
    """The rates of the adjusted groups before and after an adjustment."""

    before: dict[str, float]
    after: dict[str, float]


def composed(active: Sequence[ActiveAdjustment], group: str, scheduled: float, step: int) -> float:
    """Returns a group's rate from its scheduled one and the adjustments, oldest first; without bounds."""
    rate, factor = scheduled, 1.0
    for each in active:
        change = each.adjustment
        if each.expired_at(step) or not change.applies_to(group):
            continue
        if change.value is not None:
            rate, factor = change.value, 1.0  # a value is meant as it is: older factors do not change it
        if change.factor is not None:
            factor *= change.factor
    return rate * factor


def without_replaced(active: Sequence[ActiveAdjustment], new: Adjustment) -> list[ActiveAdjustment]:
    """Returns the adjustments that `new` does not replace.

    A value without expiry replaces all older adjustments of the same groups.
    """
    if new.value is None or new.expires_after_steps is not None:
        return list(active)
    return [each for each in active if not _covers(new, each.adjustment)]


def _covers(new: Adjustment, old: Adjustment) -> bool:
    return new.group is None or (old.group is not None and in_family(old.group, new.group))
