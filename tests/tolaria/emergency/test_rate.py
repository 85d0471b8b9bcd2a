from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolaria.emergency.rate import RateCap


@given(st.lists(st.integers(0, 40), max_size=200), st.integers(1, 5))
def test_no_window_holds_more_than_the_limit(gaps: list[int], limit: int) -> None:
    """Whatever the times, at most `limit` takes lie in any window; and one is refused only when they do."""
    cap, now, taken = RateCap(limit, 100), 0, list[int]()
    for gap in gaps:
        now += gap
        recent = [at for at in taken if at > now - 100]
        assert cap.take(now) is (len(recent) < limit)
        if len(recent) < limit:
            taken.append(now)


@given(st.integers(1, 5), st.integers(0, 1000))
def test_it_says_when_the_next_one_is_free(limit: int, start: int) -> None:
    """Not a moment earlier, and at that moment."""
    cap = RateCap(limit, 100)
    for _ in range(limit):
        assert cap.take(start)
    assert not cap.take(cap.free_at_ns - 1)
    assert cap.take(cap.free_at_ns)


@pytest.mark.parametrize(("limit", "window_ns"), [(0, 1), (1, 0)])
def test_a_cap_that_lets_nothing_through_is_refused(limit: int, window_ns: int) -> None:
    """What is held back would never be told."""
    with pytest.raises(ValueError, match="ever"):
        RateCap(limit, window_ns)
