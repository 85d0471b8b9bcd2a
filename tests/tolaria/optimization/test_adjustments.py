from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolaria.optimization.adjustments import (
    Authority,
    adjusted_rate,
    bounded_rate,
    carried_over,
    folded,
    without_replaced,
)
from tolaria.values.optimization import ActiveAdjustment, Adjustment

GROUPS = ("host/0", "host/1", "seed:a")


def change(group: str | None = None, *, origin: str = "operator", request_id: str = "r", **what: Any) -> Adjustment:
    """An adjustment, by an operator unless `origin` is given."""
    return Adjustment(group=group, origin=origin, request_id=request_id, reason="trial", **what)


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
        # Of automatic cuts the deepest counts, in any order; other factors multiply.
        ([active(0, origin="rollback", factor=0.5), active(1, origin="rollback", factor=0.25)], 0.025),
        ([active(0, origin="rollback", factor=0.25), active(1, origin="rollback", factor=0.5)], 0.025),
        ([active(0, origin="rollback", factor=0.5), active(1, factor=0.5)], 0.025),
        ([active(0, origin="rollback", factor=0.5), active(1, value=0.2)], 0.2),
    ],
)
def test_adjustments_compose(adjustments: list[ActiveAdjustment], expected: float) -> None:
    """At step 10 the newest value applies and newer factors multiply; expired and other groups' ones are ignored."""
    assert adjusted_rate(adjustments, "host", 0.1, step=10) == pytest.approx(expected)


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


def test_a_cut_replaces_those_that_are_not_deeper() -> None:
    """It includes them; nothing else is replaced, and it replaces nothing of an operator or the controller."""
    kept = [active(0, factor=0.5), active(0, origin="tamiyo", value=0.1), active(0, origin="rollback", factor=0.1)]
    replaced = [active(0, origin="rollback", factor=factor) for factor in (0.5, 0.25)]
    cut = change(origin="rollback", factor=0.25, expires_after_steps=100)
    assert without_replaced([*kept, *replaced], cut) == kept


@pytest.mark.parametrize(
    ("adjustments", "expected"),
    [
        ([active(0, factor=1e-6)], 1e-7),
        ([active(0, origin="tamiyo", factor=1e-6)], 0.001),
        ([active(0, origin="tamiyo", factor=1e6)], 1.0),
        ([active(0, origin="tamiyo", value=0.0)], 0.001),
        ([active(0, factor=0.1), active(1, origin="tamiyo", value=5.0)], 0.1),
        ([active(0, origin="rollback", factor=0.5), active(1, origin="tamiyo", factor=1e-6)], 0.0005),
        ([active(0, origin="tamiyo", factor=1e-6), active(1, value=0.7)], 0.7),
        ([active(0, "seed:a", origin="tamiyo", factor=1e-6)], 0.1),
    ],
)
def test_the_controllers_share_is_bounded(adjustments: list[ActiveAdjustment], expected: float) -> None:
    """From 0.01 to 10 times the rate without it; others are not bounded here."""
    rate = bounded_rate(adjustments, "host", 0.1, step=10, authority=Authority(0.01, 10.0))
    assert rate == pytest.approx(expected)


_groups = st.sampled_from([None, "host", *GROUPS])
_lasting = st.builds(
    lambda group, origin, factor: active(0, group, origin=origin, factor=factor),
    _groups,
    st.sampled_from(["operator", "tamiyo"]),
    st.floats(0.5, 2.0),
)
_others = st.one_of(
    st.builds(lambda group, value: active(0, group, value=value), _groups, st.floats(0.01, 1.0)),
    st.builds(
        lambda group, value, steps: active(0, group, value=value, expires_after_steps=steps),
        _groups,
        st.floats(0.01, 1.0),
        st.integers(1, 20),
    ),
    st.builds(
        lambda group, factor, steps: active(0, group, factor=factor, expires_after_steps=steps),
        _groups,
        st.floats(0.5, 2.0),
        st.integers(1, 20),
    ),
)


@given(st.lists(st.one_of(_lasting, _lasting, _others), max_size=30), st.sampled_from(GROUPS), st.integers(0, 25))
def test_folding_changes_no_rate(adjustments: list[ActiveAdjustment], group: str, step: int) -> None:
    """At any step, for any group; no two lasting factors of a group and origin are left beside each other."""
    less = folded(adjustments)
    assert adjusted_rate(less, group, 0.1, step) == pytest.approx(adjusted_rate(adjustments, group, 0.1, step))
    assert folded(less) == less
    kinds = [(each.adjustment.group, each.adjustment.origin, each.lasting) for each in less]
    if all(each.adjustment.value is None for each in less):
        lasting = [kind for kind in kinds if kind[2]]
        assert len(set(lasting)) == len(lasting)


A, B = {"request_id": "a"}, {"request_id": "b"}
CUT: dict[str, Any] = {"origin": "rollback", "factor": 0.5, "expires_after_steps": 100}


@pytest.mark.parametrize(
    ("restored", "in_force", "expected"),
    [
        # Made since the restored state: in force from there, for the steps that were left of it.
        ([], [active(70, factor=0.1, **A)], [active(50, factor=0.1, **A)]),
        (
            [],
            [active(70, factor=0.1, expires_after_steps=40, **A)],
            [active(50, factor=0.1, expires_after_steps=30, **A)],
        ),
        ([], [active(70, factor=0.1, expires_after_steps=10, **A)], []),
        # Made before it: unchanged.
        ([active(40, factor=0.1, **A)], [active(40, factor=0.1, **A)], [active(40, factor=0.1, **A)]),
        (
            [active(40, factor=0.1, expires_after_steps=20, **A)],
            [],
            [active(40, factor=0.1, expires_after_steps=20, **A)],
        ),
        # Replaced since then: it stays replaced.
        ([active(40, factor=0.1, **A)], [active(70, value=0.3, **B)], [active(50, value=0.3, **B)]),
        ([active(40, value=0.1, **A)], [active(70, value=0.3, **B)], [active(50, value=0.3, **B)]),
        # Of another origin: part of the state.
        ([active(40, factor=0.1, origin="tamiyo")], [], [active(40, factor=0.1, origin="tamiyo")]),
        ([], [active(70, factor=0.1, origin="tamiyo")], []),
        # An automatic cut: as an operator's, once, and without a shallower one that the restored state has.
        ([], [active(71, **CUT, **A)], [active(50, factor=0.5, expires_after_steps=91, origin="rollback", **A)]),
        ([active(40, **CUT, **A)], [active(40, **CUT, **A)], [active(40, **CUT, **A)]),
        ([active(40, **CUT, **A)], [active(45, **CUT, **A)], [active(40, **CUT, **A)]),
        (
            [active(40, **CUT, **A)],
            [active(80, **{**CUT, "factor": 0.25}, **B)],
            [active(50, **{**CUT, "factor": 0.25}, **B)],
        ),
        ([active(40, **CUT, **A)], [active(70, value=0.3, **B)], [active(50, value=0.3, **B)]),
        (
            [active(40, value=0.1, origin="tamiyo")],
            [active(70, value=0.3, **B)],
            [active(50, value=0.3, **B)],
        ),
    ],
)
def test_what_belongs_to_the_run_outlives_a_restore(
    restored: list[ActiveAdjustment], in_force: list[ActiveAdjustment], expected: list[ActiveAdjustment]
) -> None:
    """From step 80 back to step 50: decisions of operators and cuts stay, the rest is that of the restored state."""
    assert carried_over(restored, in_force, from_step=80, at_step=50) == expected


def test_folded_factors_are_not_counted_twice_after_a_restore() -> None:
    """The restored state has them one by one, the live state their product: the product counts."""
    single = [active(step, factor=0.5, request_id=str(step)) for step in range(4)]
    after = carried_over(single[:2], folded(single), from_step=80, at_step=50)
    assert adjusted_rate(after, "host", 1.0, step=60) == 0.5**4


def test_a_crash_keeps_all_steps_of_a_temporary_adjustment() -> None:
    """The step at which the process was killed is unknown: it applies for all its steps from the resumed one on."""
    kept = [active(70, factor=0.1, expires_after_steps=40, **A)]
    assert carried_over([], kept, from_step=50, at_step=50) == [active(50, factor=0.1, expires_after_steps=40, **A)]
    assert carried_over([], kept, from_step=200, at_step=200) == []
