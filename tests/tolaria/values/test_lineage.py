from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolaria.values.lineage import Lineage

TWICE = Lineage().back_to(100, 2).back_to(150, 3)


@pytest.mark.parametrize(
    ("attempt", "step", "included"),
    [
        (1, 100, True),
        (1, 101, False),
        (2, 101, True),
        (2, 150, True),
        (2, 151, False),
        (3, 151, True),
        (4, 1, False),
    ],
)
def test_ancestors(attempt: int, step: int, included: bool) -> None:
    """Of an earlier attempt only what led to the state; of the present one everything."""
    assert TWICE.forks == ((1, 100), (2, 150))
    assert TWICE.includes(attempt, step) is included


@pytest.mark.parametrize(("step", "attempt"), [(0, 1), (100, 1), (101, 2), (150, 2), (151, 3)])
def test_the_attempt_of_a_step(step: int, attempt: int) -> None:
    """A step on the way to the state belongs to the attempt that made it."""
    assert TWICE.attempt_at(step) == attempt


def test_going_back_over_a_fork_drops_it() -> None:
    """A rollback to before an earlier rollback's target leaves the attempts in between."""
    back = TWICE.back_to(60, 4)
    assert back == Lineage(4, ((1, 60),))
    assert not back.includes(2, 120)


def test_a_run_in_a_circle_has_a_short_lineage() -> None:
    """A hundred rollbacks to the same step leave one fork."""
    lineage = Lineage()
    for attempt in range(2, 102):
        lineage = lineage.back_to(50, attempt)
    assert lineage == Lineage(101, ((1, 50),))


@given(st.lists(st.integers(0, 200), max_size=8))
def test_the_json_is_lossless_and_steps_ascend(steps: list[int]) -> None:
    """Whatever the rollbacks were."""
    lineage, reached = Lineage(), 200
    for attempt, step in enumerate(steps, start=2):
        lineage, reached = lineage.back_to(min(step, reached), attempt), 200
    assert Lineage.of(lineage.attempt, lineage.to_json()) == lineage
    lasts = [last for _, last in lineage.forks]
    assert lasts == sorted(lasts)
    assert len({attempt for attempt, _ in lineage.forks}) == len(lineage.forks)


@pytest.mark.parametrize("text", ["{", "[1]", '[["a", 2]]'])
def test_another_text_is_refused(text: str) -> None:
    """It is not what `to_json` returns."""
    with pytest.raises((ValueError, TypeError)):
        Lineage.of(1, text)
