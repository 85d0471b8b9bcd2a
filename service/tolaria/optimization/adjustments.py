"""How learning-rate adjustments compose, are bounded and folded, and which outlive a restore. Pure functions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from tolaria.values.optimization import AUTOMATIC, CONTROLLER, OF_THE_RUN, ActiveAdjustment, Adjustment, in_family

ADJUSTMENTS_MAX: Final = 64
"""Number of adjustments from which lasting factors are folded together, and temporary ones are refused."""


@dataclass(frozen=True, slots=True)
class Authority:
    """The lowest and highest learning rate that the controller may set, as multiples of the rate without it."""

    lowest: float
    highest: float


def adjusted_rate(active: Sequence[ActiveAdjustment], group: str, scheduled: float, step: int) -> float:
    """Returns a group's rate from its scheduled one and the adjustments, oldest first; without bounds.

    The newest active value replaces the scheduled rate, then the factors that are newer than the value multiply. Of
    automatic cuts only the deepest counts, since each includes those before it.
    """
    rate, factor, cut = scheduled, 1.0, 1.0
    for each in active:
        change = each.adjustment
        if each.expired_at(step) or not change.applies_to(group):
            continue
        if change.value is not None:
            rate, factor, cut = change.value, 1.0, 1.0  # a value is absolute: older factors do not change it
        elif change.factor is not None and change.origin == AUTOMATIC:
            cut = min(cut, change.factor)
        elif change.factor is not None:
            factor *= change.factor
    return rate * factor * cut


def without_replaced(active: Sequence[ActiveAdjustment], new: Adjustment) -> list[ActiveAdjustment]:
    """Returns the adjustments that `new` does not replace: a value without expiry replaces older ones of its groups.

    The controller replaces only its own adjustments, and an automatic cut those that are not deeper.
    """
    if new.origin == AUTOMATIC:
        return [each for each in active if each.adjustment.origin != AUTOMATIC or _cuts_deeper(each.adjustment, new)]
    if new.value is None or new.expires_after_steps is not None:
        return list(active)

    def replaced(old: Adjustment) -> bool:
        of_its_groups = new.group is None or (old.group is not None and in_family(old.group, new.group))
        return of_its_groups and (new.origin != CONTROLLER or old.origin == CONTROLLER)

    return [each for each in active if not replaced(each.adjustment)]


def rate_without_controller(active: Sequence[ActiveAdjustment], group: str, scheduled: float, step: int) -> float:
    """Returns the rate that the schedule and all adjustments except the controller's give; without bounds."""
    others = [each for each in active if each.adjustment.origin != CONTROLLER]
    return adjusted_rate(others, group, scheduled, step)


def bounded_rate(
    active: Sequence[ActiveAdjustment], group: str, scheduled: float, step: int, authority: Authority
) -> float:
    """Returns the adjusted rate, which the controller's adjustments change within its authority only."""
    rate = adjusted_rate(active, group, scheduled, step)
    if all(each.adjustment.origin != CONTROLLER for each in active):
        return rate
    own = rate_without_controller(active, group, scheduled, step)
    return min(max(rate, own * authority.lowest), own * authority.highest)


def folded(active: Sequence[ActiveAdjustment]) -> list[ActiveAdjustment]:
    """Returns adjustments with the same effect, in which lasting factors of one group and origin are multiplied.

    A product keeps the request id of its newest factor. A value between two factors keeps them apart.
    """
    kept: list[ActiveAdjustment] = []
    for each in active:
        place = _foldable_with(kept, each)
        kept.append(each if place is None else _product(kept.pop(place), each))
    return kept


def carried_over(
    restored: Sequence[ActiveAdjustment], in_force: Sequence[ActiveAdjustment], *, from_step: int, at_step: int
) -> list[ActiveAdjustment]:
    """Returns the adjustments after a restore: those of the restored state, and those of the run made since.

    An adjustment in force that belongs to the run, and that the restored state lacks, begins anew at `at_step`, for the
    steps that were left of it. A lasting one in the restored state that is no longer in force stays replaced.

    Args:
        restored: the adjustments in the restored state.
        in_force: the adjustments before the restore, or those that the journal has.
        from_step: the global step before the restore; after a crash the step that training resumes from.
        at_step: the global step of the restored state.
    """
    decided = {each.adjustment.request_id: each for each in in_force if each.adjustment.origin in OF_THE_RUN}
    result = [
        each
        for each in restored
        if each.adjustment.origin not in OF_THE_RUN or not each.lasting or each.adjustment.request_id in decided
    ]
    present = {each.adjustment.request_id for each in result if each.adjustment.origin in OF_THE_RUN}
    for request_id, each in decided.items():
        if request_id in present or each.expired_at(from_step):
            continue
        lasts = each.adjustment.expires_after_steps
        left = None if lasts is None else each.at_step + lasts - max(from_step, each.at_step)
        moved = ActiveAdjustment(replace(each.adjustment, expires_after_steps=left), at_step)
        result = [*without_replaced(result, moved.adjustment), moved]
    return result


def _cuts_deeper(old: Adjustment, new: Adjustment) -> bool:
    return (old.factor or 0.0) < (new.factor or 0.0)


def _foldable_with(kept: Sequence[ActiveAdjustment], new: ActiveAdjustment) -> int | None:
    """Returns the place of the factor that `new` can be multiplied with."""
    if new.adjustment.factor is None or not new.lasting or new.adjustment.origin == AUTOMATIC:
        return None
    for place in reversed(range(len(kept))):
        old = kept[place].adjustment
        if old.value is not None and _overlap(old.group, new.adjustment.group):
            return None
        same = (old.group, old.origin) == (new.adjustment.group, new.adjustment.origin)
        if same and old.factor is not None and kept[place].lasting:
            return place
    return None


def _product(old: ActiveAdjustment, new: ActiveAdjustment) -> ActiveAdjustment:
    product = (old.adjustment.factor or 1.0) * (new.adjustment.factor or 1.0)
    factor = min(max(product, sys.float_info.min), sys.float_info.max)
    return replace(new, adjustment=replace(new.adjustment, factor=factor))


def _overlap(group: str | None, other: str | None) -> bool:
    return group is None or other is None or in_family(group, other) or in_family(other, group)
