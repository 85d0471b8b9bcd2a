from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolaria.rollback import Cadence


@pytest.mark.parametrize(
    ("snapshot_s", "step_s", "overhead_max", "steps"),
    [
        (0.001, 0.1, 0.01, 1),
        (0.001, 0.01, 0.01, 10),
        (0.1, 0.001, 0.01, 10_000),
        (0.0, 0.1, 0.01, 1),
        (1.0, 2.0, 1.0, 1),
    ],
)
def test_intervals(snapshot_s: float, step_s: float, overhead_max: float, steps: int) -> None:
    """Dear snapshots of fast steps are rare, cheap ones are taken at every step."""
    assert steps_until_due(Cadence(overhead_max).after_snapshot(snapshot_s), step_s) == steps


@given(st.floats(1e-4, 0.1), st.floats(2e-3, 10), st.floats(1e-2, 1))
def test_overhead_stays_under_its_limit_and_no_step_is_wasted(snapshot_s: float, step_s: float, limit: float) -> None:
    """The steps until the next one keep the limit, and one step less would not."""
    steps = steps_until_due(Cadence(limit).after_snapshot(snapshot_s), step_s)
    assert snapshot_s <= limit * steps * step_s * (1 + 1e-6)
    assert steps == 1 or snapshot_s > limit * (steps - 1) * step_s * (1 - 1e-6)


def test_a_run_spends_its_share_and_no_more() -> None:
    """Over a thousand steps of 10 ms with snapshots of 2 ms, snapshots cost at most 1 % and nearly that."""
    assert 0.009 <= share_of_snapshots(1000, lambda: 0.010, lambda: 0.002) <= 0.0102


def test_steps_that_differ_wildly_do_not_make_snapshots_dearer() -> None:
    """One step in twenty takes fifty times as long, as on a busy machine; the share is kept all the same."""
    chance = random.Random(0)  # noqa: S311 - nothing secret
    share = share_of_snapshots(
        20_000,
        lambda: 0.1 if chance.random() < 0.05 else 0.002,
        lambda: 0.020 if chance.random() < 0.05 else 0.002,
    )
    assert 0.0085 <= share <= 0.0105


@pytest.mark.parametrize("overhead_max", [0.0, -0.01])
def test_an_impossible_limit_is_refused(overhead_max: float) -> None:
    """A limit of zero has no interval."""
    with pytest.raises(ValueError, match="positive"):
        Cadence(overhead_max)


def steps_until_due(cadence: Cadence, step_s: float) -> int:
    """Steps of that length after which a snapshot is due."""
    while not (cadence := cadence.after_step(step_s)).due:
        pass
    return cadence.steps_since


def share_of_snapshots(steps: int, step_s: Callable[[], float], snapshot_s: Callable[[], float]) -> float:
    """Of all time of the steps, when the cadence is followed."""
    cadence, spent_s, stepped_s = Cadence(), 0.0, 0.0
    for _ in range(steps):
        if cadence.due:
            cost_s = snapshot_s()
            spent_s += cost_s
            cadence = cadence.after_snapshot(cost_s)
        taken_s = step_s()
        stepped_s += taken_s
        cadence = cadence.after_step(taken_s)
    return spent_s / stepped_s
