from __future__ import annotations

import pytest

from tolaria.security.limits import CALLERS_MAX, Bucket, CallerLimits, CallLimits


class Clock:
    """Seconds that a test sets."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def limits(clock: Clock, **values: float) -> CallerLimits:
    """Limits of 10 calls and 2 mistakes per second, 3 calls in flight and 2 streams."""
    defaults = {"calls_per_second": 10.0, "bad_calls_per_second": 2.0, "calls_in_flight_max": 3, "streams_max": 2}
    return CallerLimits(CallLimits(**(defaults | values)), clock=clock)  # type: ignore[arg-type] # whole numbers


def test_a_bucket_allows_a_burst_and_then_its_rate() -> None:
    """It fills while it is not used, up to its size."""
    bucket = Bucket.full(10.0, 2.0, 0.0)
    assert [bucket.take(0.0) for _ in range(21)] == [True] * 20 + [False]
    assert [bucket.take(0.15) for _ in range(2)] == [True, False]
    assert sum(bucket.take(1000.0) for _ in range(100)) == 20


def test_a_rate_of_zero_is_no_limit() -> None:
    """And never empty."""
    bucket = Bucket.full(0.0, 2.0, 0.0)
    assert all(bucket.take(0.0) for _ in range(1000))
    assert not bucket.empty(0.0)


def test_a_small_rate_allows_one_call() -> None:
    """Otherwise none would ever pass."""
    assert Bucket.full(0.1, 2.0, 0.0).take(0.0)


@pytest.mark.parametrize(
    ("stream", "in_flight", "streams", "words"),
    [
        (False, 3, 0, "server.calls_in_flight_max"),
        (True, 0, 2, "server.streams_max"),
        (False, 2, 2, ""),
        (True, 3, 1, ""),
    ],
)
def test_calls_and_streams_are_limited_apart(stream: bool, in_flight: int, streams: int, words: str) -> None:
    """The refusal names the setting."""
    found = limits(Clock())
    usage = found.usage("a")
    usage.in_flight, usage.streams = in_flight, streams
    refusal = found.refusal(usage, stream=stream)
    assert words in refusal
    assert bool(refusal) is bool(words)


def test_callers_do_not_share_their_limits() -> None:
    """One that makes too many calls is refused, another is not; after a while neither is."""
    clock = Clock()
    found = limits(clock)
    refusals = [found.refusal(found.usage("a"), stream=False) for _ in range(25)]
    assert refusals.count("") == 20
    assert "10 calls per second (server.calls_per_second)" in refusals[-1]
    assert not found.refusal(found.usage("b"), stream=False)
    clock.now_s += 1
    assert not found.refusal(found.usage("a"), stream=False)


def test_mistakes_have_to_be_many_before_a_caller_waits() -> None:
    """Bursts of four seconds' worth; it passes by waiting."""
    clock = Clock()
    found = limits(clock)
    usage = found.usage("a")
    for _ in range(8):
        assert not found.must_wait(usage)
        found.mistake(usage)
    assert found.must_wait(usage)
    clock.now_s += 1
    assert not found.must_wait(usage)


def test_callers_are_forgotten_the_idle_ones_first() -> None:
    """Attackers may have many addresses; what is in flight is never forgotten."""
    found = limits(Clock())
    busy = found.usage("busy")
    busy.in_flight = 1
    for number in range(CALLERS_MAX + 10):
        found.usage(str(number))
    assert found.usage("busy") is busy
    assert found.usage("0").calls.level == 20
