from __future__ import annotations

import math
from typing import Any

import pytest

from tolaria.errors import AdjustmentRefusedError
from tolaria.optimization.adjustments import composed, without_replaced
from tolaria.values.optimization import ActiveAdjustment, Adjustment


def change(group: str | None = None, **what: Any) -> Adjustment:
    """An adjustment with a plausible origin."""
    return Adjustment(group=group, origin="operator", request_id="r", reason="trial", **what)


def live(at_step: int, group: str | None = None, **what: Any) -> ActiveAdjustment:
    """One that holds from `at_step` on."""
    return ActiveAdjustment(change(group, **what), at_step)


@pytest.mark.parametrize(
    ("living", "expected"),
    [
        ([], 0.1),
        ([live(0, factor=0.5)], 0.05),
        ([live(0, factor=0.5), live(1, factor=0.5)], 0.025),
        ([live(0, value=0.4), live(1, value=0.2)], 0.2),
        ([live(0, factor=0.5), live(1, value=0.2)], 0.2),
        ([live(0, value=0.2), live(1, factor=0.5)], 0.1),
        ([live(0, "host", value=0.2)], 0.2),
        ([live(0, "seed:a", value=0.2)], 0.1),
        ([live(0, factor=0.5, expires_after_steps=10)], 0.1),
        ([live(0, factor=0.5, expires_after_steps=11)], 0.05),
        ([live(0, value=0.4), live(1, value=0.2, expires_after_steps=9)], 0.4),
    ],
)
def test_adjustments_compose(living: list[ActiveAdjustment], expected: float) -> None:
    """At step 10: the newest value wins, newer factors multiply; what expired or means another group does nothing."""
    assert composed(living, "host", 0.1, step=10) == pytest.approx(expected)


def test_a_name_means_its_family_but_not_every_name_it_begins() -> None:
    """`host` means host and host/1, not hostess."""
    meant = change("host", factor=2.0)
    assert [meant.applies_to(name) for name in ("host", "host/1", "hostess")] == [True, True, False]


def test_a_lasting_value_ends_what_it_replaces() -> None:
    """All that is older and of its groups goes; other groups' and those of all groups stay."""
    stays = [
        live(0, "seed:a", value=0.3),
        live(0, None, value=0.1),
    ]
    goes = [
        live(0, "host/1", value=0.2),
        live(0, "host", factor=0.9),
        live(0, "host", factor=0.5, expires_after_steps=50),
        live(0, "host", value=1.0, expires_after_steps=9),
    ]
    assert without_replaced([*goes, *stays], change("host", value=0.5)) == stays
    assert without_replaced(goes, change("host", value=0.5, expires_after_steps=5)) == goes


@pytest.mark.parametrize(
    ("what", "field"),
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
def test_an_adjustment_without_sense_cannot_be_made(what: dict[str, Any], field: str) -> None:
    """The error names the field."""
    with pytest.raises(AdjustmentRefusedError) as caught:
        change(**what)
    assert caught.value.field == field
