from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria.status_page.curves import POINTS_MAX, RECENT_MAX, Curve, EncodedCurve


def values_of(curve: Curve) -> tuple[int, float, float]:
    """Number of the values, the lowest and the highest."""
    points = curve.points
    return sum(each.count for each in points), min(each.low for each in points), max(each.high for each in points)


def test_a_million_steps_keep_their_extremes_in_a_bounded_curve() -> None:
    """A loss that falls, with one spike and one dip: both are there, and the points are few and in order."""
    curve = Curve()
    for step in range(1, 1_000_001):
        curve.add(step, 5.0 - step * 4e-6 + (3.0 if step == 500_123 else -2.0 if step == 700_321 else 0.0))
    assert POINTS_MAX // 2 <= len(curve.points) <= POINTS_MAX
    assert values_of(curve)[0] == 1_000_000
    (spike,) = [each for each in curve.points if each.high > 5.1]
    (dip,) = [each for each in curve.points if each.low < 1.0]
    assert spike.first <= 500_123 <= spike.last
    assert dip.first <= 700_321 <= dip.last
    assert spike.high == pytest.approx(8.0 - 500_123 * 4e-6)
    assert all(one.last < other.first for one, other in zip(curve.points, curve.points[1:], strict=False))
    assert len(EncodedCurve(curve).changes()) < 20_000


def test_a_rollback_leaves_the_surviving_steps_exactly() -> None:
    """A point that covers both kept and removed steps loses what was removed: an explosion does not stay in sight."""
    curve = Curve()
    for step in range(100_000):
        curve.add(step, 1.0 if step <= 99_900 else 1e9)
    revision = curve.revision
    curve.rewind(99_900)
    assert values_of(curve) == (99_901, 1.0, 1.0)
    assert curve.points[-1].last == 99_900
    assert curve.revision > revision
    curve.add(99_901, 2.0)
    assert curve.points[-1].high == 2.0


def test_a_rollback_past_the_latest_values_keeps_whole_points_only() -> None:
    """Nothing of the removed steps stays; at most the kept part of one point is lost."""
    curve = Curve()
    for step in range(100_000):
        curve.add(step, 1.0 if step <= 50_010 else 9.0)
    curve.rewind(50_010)
    count, _, high = values_of(curve)
    assert high == 1.0
    assert 50_011 - 1024 <= count <= 50_011


def test_values_that_are_not_finite_are_left_out() -> None:
    """JSON does not have them; and a mean of huge values is a number too."""
    curve = Curve(2)
    for value in (float("nan"), float("inf"), 1e308, 1e308, 1e308):
        curve.add(1, value)
    assert json.loads(EncodedCurve(curve).changes())["points"] == [[1, 1, 1e308, 1e308, 1e308]]


def test_a_curve_of_epochs_keeps_each_until_there_are_too_many() -> None:
    """Steps between values may be any number."""
    curve = Curve()
    for epoch in range(POINTS_MAX):
        curve.add(391 * epoch, epoch)
    assert len(curve.points) == POINTS_MAX
    curve.add(391 * POINTS_MAX, 0.0)
    assert len(curve.points) < POINTS_MAX


@given(
    st.lists(st.tuples(st.sampled_from(["add", "add", "add", "rewind", "send"]), st.integers(1, 40)), max_size=200),
    st.integers(2, 12),
)
@settings(max_examples=150)
def test_a_viewer_that_applies_changes_has_the_points_of_the_curve(
    actions: list[tuple[str, int]], points_max: int
) -> None:
    """Whatever is added, removed and sent when; and the extremes are those of the steps that survive."""
    curve, encoded, seen = Curve(points_max), None, list[list[float]]()
    encoded = EncodedCurve(curve)
    kept: dict[int, float] = {}
    step = 0
    for action, size in actions:
        if action == "add":
            step += size
            kept[step] = float(size)
            curve.add(step, float(size))
        elif action == "rewind":
            step = max(0, step - size)
            kept = {each: value for each, value in kept.items() if each <= step}
            curve.rewind(step)
        elif text := encoded.changes():
            change = json.loads(text)
            seen = seen[: change["at"]] + change["points"]
            assert seen == json.loads(encoded.whole())["points"]
            assert [(point[0], point[1]) for point in seen] == [(each.first, each.last) for each in curve.points]
        assert len(curve.points) <= points_max
        assert sum(each.count for each in curve.points) == len(kept) <= RECENT_MAX
        if kept:
            assert values_of(curve)[1:] == (min(kept.values()), max(kept.values()))


def test_a_value_costs_little() -> None:
    """The event loop adds one for each step: far below the time of any step, on a busy machine too."""
    best_s = float("inf")
    for _ in range(5):
        curve = Curve()
        begun_s = time.process_time()
        for step in range(20_000):
            curve.add(step, 1.0)
        best_s = min(best_s, time.process_time() - begun_s)
    assert best_s / 20_000 < 20e-6
