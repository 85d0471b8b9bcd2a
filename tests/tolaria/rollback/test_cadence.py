from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolaria.rollback import Cadence, interval_steps


@pytest.mark.parametrize(
    ("snapshot_s", "step_s", "overhead_max", "interval"),
    [
        (0.001, 0.1, 0.01, 1),
        (0.001, 0.01, 0.01, 10),
        (0.1, 0.001, 0.01, 10_000),
        (0.0, 0.1, 0.01, 1),
        (1.0, 0.0, 0.01, 1),
    ],
)
def test_intervals(snapshot_s: float, step_s: float, overhead_max: float, interval: int) -> None:
    """Dear snapshots of fast steps are rare, cheap ones are taken at every step."""
    assert interval_steps(snapshot_s, step_s, overhead_max) == interval


@given(st.floats(1e-6, 10), st.floats(1e-5, 10), st.floats(1e-4, 1))
def test_overhead_stays_under_its_limit_and_no_step_is_wasted(snapshot_s: float, step_s: float, limit: float) -> None:
    """The interval keeps the limit, and one step less would not."""
    interval = interval_steps(snapshot_s, step_s, limit)
    assert snapshot_s <= limit * interval * step_s * (1 + 1e-9)
    assert interval == 1 or snapshot_s > limit * (interval - 1) * step_s * (1 - 1e-9)


def test_a_run_spends_its_share_and_no_more() -> None:
    """Over a thousand steps of 10 ms with snapshots of 2 ms, snapshots cost at most 1 % and nearly that."""
    cadence, spent_s = Cadence(), 0.0
    for _ in range(1000):
        if cadence.due:
            spent_s += 0.002
            cadence = cadence.after_snapshot(0.002)
        cadence = cadence.after_step(0.010)
    assert 0.009 <= spent_s / 10.0 <= 0.0102


def test_an_impossible_limit_is_refused() -> None:
    """A limit of zero has no interval."""
    with pytest.raises(ValueError, match="positive"):
        interval_steps(1.0, 1.0, 0.0)
