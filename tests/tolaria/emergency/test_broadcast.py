from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from leyline.v1.emergency_pb2 import EmergencySignal
from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT, EMERGENCY_LEVEL_NOTICE
from tolaria.emergency.broadcast import (
    REASON_CHARACTERS_MAX,
    Backlog,
    Notice,
    RateLimit,
    new_notice,
)
from tolaria.signals import Signal

HALT, NOTICE = EMERGENCY_LEVEL_HALT, EMERGENCY_LEVEL_NOTICE


def notice(reason: str, at_ns: int = 0, level: int = NOTICE) -> Notice:
    """A notice of one signal from tolaria."""
    signal = Signal("tolaria", level, reason, 1, at_ns)  # type: ignore[arg-type]
    return new_notice(signal, run_id="run-1", triggered_unix_ns=5_000_000_007, attributes={"global_step": "3"})


def drained(backlog: Backlog) -> list[tuple[str, int]]:
    """Takes everything out: reason and count."""
    found = []
    while len(backlog):
        found.append((backlog.first.signal.reason, backlog.first.count))
        backlog.remove_first()
    return found


def test_notices_come_out_in_order_of_arrival() -> None:
    """Equal signals share a notice at the place of the first."""
    backlog = Backlog(10)
    for at_ns, reason in enumerate("abac"):
        backlog.put(notice(reason, at_ns))
    assert backlog.first.signal.monotonic_time_ms == 0
    assert drained(backlog) == [("a", 2), ("b", 1), ("c", 1)]


def test_too_many_reasons_share_a_notice_of_each_level() -> None:
    """Beyond the bound further signals of a level share one notice, with the reason of the first."""
    backlog = Backlog(2)
    for reason in "abcde":
        backlog.put(notice(reason))
    backlog.put(notice("f", level=HALT))
    backlog.put(notice("a"))
    assert drained(backlog) == [("a", 2), ("b", 1), ("c", 3), ("f", 1)]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([NOTICE, HALT]))), st.integers(1, 4))
def test_no_signal_is_lost_and_memory_is_bounded(signals: list[tuple[str, int]], reasons_max: int) -> None:
    """Counts add up to the signals put in, in at most one notice more for each level than the bound."""
    backlog = Backlog(reasons_max)
    for reason, level in signals:
        backlog.put(notice(reason, level=level))
        assert len(backlog) <= reasons_max + 2
    assert sum(count for _, count in drained(backlog)) == len(signals)


def test_a_signal_carries_its_checksum_and_a_bounded_reason() -> None:
    """The checksum is the SHA-256 of the message without it."""
    signal = notice("x" * 5000, 3_000_000).signal
    assert (signal.version, signal.monotonic_time_ms, len(signal.reason)) == (1, 3, REASON_CHARACTERS_MAX)
    assert (signal.run_id, dict(signal.attributes)) == ("run-1", {"global_step": "3"})
    assert signal.triggered_at.ToNanoseconds() == 5_000_000_007
    bare = EmergencySignal()
    bare.CopyFrom(signal)
    bare.ClearField("payload_checksum")
    assert signal.payload_checksum == hashlib.sha256(bare.SerializeToString(deterministic=True)).digest()


@given(st.lists(st.integers(0, 40), max_size=200), st.integers(1, 5))
def test_no_window_holds_more_than_the_limit(gaps: list[int], limit: int) -> None:
    """At most `limit` takes lie in any window, and one is refused only then."""
    limited, now, taken = RateLimit(limit, 100), 0, list[int]()
    for gap in gaps:
        now += gap
        recent = [at for at in taken if at > now - 100]
        assert limited.take(now) is (len(recent) < limit)
        if len(recent) < limit:
            taken.append(now)


@given(st.integers(1, 5), st.integers(0, 1000))
def test_the_next_take_is_permitted_when_announced(limit: int, start: int) -> None:
    """At `free_at_ns`, and not a nanosecond earlier."""
    limited = RateLimit(limit, 100)
    for _ in range(limit):
        assert limited.take(start)
    assert not limited.take(limited.free_at_ns - 1)
    assert limited.take(limited.free_at_ns)
