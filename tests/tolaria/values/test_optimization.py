from __future__ import annotations

import math
from typing import Any

import pytest

from tolaria.errors import AdjustmentRefusedError
from tolaria.values.optimization import ActiveAdjustment, Adjustment


def change(group: str | None = None, **fields: Any) -> Adjustment:
    """An adjustment by an operator."""
    return Adjustment(group=group, origin="operator", request_id="r", reason="trial", **fields)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "factor"),
        ({"factor": 1.0, "value": 1.0}, "factor"),
        ({"factor": 0.0}, "factor"),
        ({"factor": -1.0}, "factor"),
        ({"factor": math.nan}, "factor"),
        ({"value": -0.1}, "value"),
        ({"value": math.inf}, "value"),
        ({"factor": 0.5, "expires_after_steps": 0}, "expires_after_steps"),
    ],
)
def test_an_invalid_adjustment_is_refused(fields: dict[str, Any], field: str) -> None:
    """The error names the invalid field."""
    with pytest.raises(AdjustmentRefusedError) as caught:
        change(**fields)
    assert caught.value.field == field


def test_an_adjustment_applies_to_the_family_of_its_group() -> None:
    """`host` includes host and host/1, not hostess; None includes every group."""
    groups = ("host", "host/1", "hostess")
    assert [change("host", factor=2.0).applies_to(name) for name in groups] == [True, True, False]
    assert all(change(None, factor=2.0).applies_to(name) for name in groups)


def test_an_adjustment_expires_after_its_steps() -> None:
    """It is active for exactly `expires_after_steps` steps; without them it never expires."""
    limited = ActiveAdjustment(change(factor=2.0, expires_after_steps=3), at_step=5)
    assert [limited.expired_at(step) for step in (5, 7, 8)] == [False, False, True]
    assert not ActiveAdjustment(change(factor=2.0), at_step=5).expired_at(10**9)
