from __future__ import annotations

from typing import Any

import pytest

from tolaria.optimization.adjustments import composed, without_replaced
from tolaria.values.optimization import ActiveAdjustment, Adjustment


def change(group: str | None = None, **fields: Any) -> Adjustment:
    """An adjustment by an operator."""
    return Adjustment(group=group, origin="operator", request_id="r", reason="trial", **fields)


def active(at_step: int, group: str | None = None, **fields: Any) -> ActiveAdjustment:
    """An adjustment that is active from `at_step` on."""
    return ActiveAdjustment(change(group, **fields), at_step)


@pytest.mark.parametrize(
    ("adjustments", "expected"),
    [
        ([], 0.1),
        ([active(0, factor=0.5)], 0.05),
        ([active(0, factor=0.5), active(1, factor=0.5)], 0.025),
        ([active(0, value=0.4), active(1, value=0.2)], 0.2),
        ([active(0, factor=0.5), active(1, value=0.2)], 0.2),
        ([active(0, value=0.2), active(1, factor=0.5)], 0.1),
        ([active(0, "host", value=0.2)], 0.2),
        ([active(0, "seed:a", value=0.2)], 0.1),
        ([active(0, factor=0.5, expires_after_steps=10)], 0.1),
        ([active(0, factor=0.5, expires_after_steps=11)], 0.05),
        ([active(0, value=0.4), active(1, value=0.2, expires_after_steps=9)], 0.4),
    ],
)
def test_adjustments_compose(adjustments: list[ActiveAdjustment], expected: float) -> None:
    """At step 10 the newest value applies and newer factors multiply; expired and other groups' ones are ignored."""
    assert composed(adjustments, "host", 0.1, step=10) == pytest.approx(expected)


def test_a_value_without_expiry_replaces_older_adjustments() -> None:
    """Older adjustments of its groups are replaced; those of other groups and of all groups stay."""
    kept = [
        active(0, "seed:a", value=0.3),
        active(0, None, value=0.1),
    ]
    replaced = [
        active(0, "host/1", value=0.2),
        active(0, "host", factor=0.9),
        active(0, "host", factor=0.5, expires_after_steps=50),
        active(0, "host", value=1.0, expires_after_steps=9),
    ]
    assert without_replaced([*replaced, *kept], change("host", value=0.5)) == kept
    assert without_replaced(replaced, change("host", value=0.5, expires_after_steps=5)) == replaced
