from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT, EMERGENCY_LEVEL_NOTICE
from tolaria.emergency.backlog import REASON_CHARACTERS_MAX, VARIOUS, Backlog, Notice, checksum, new_notice

HALT, NOTICE = EMERGENCY_LEVEL_HALT, EMERGENCY_LEVEL_NOTICE


def notice(reason: str, at_ns: int = 0, level: int = NOTICE) -> Notice:
    """One signal of tolaria's."""
    return new_notice(level, reason, "tolaria", at_ns)  # type: ignore[arg-type]


def drained(backlog: Backlog) -> list[tuple[str, int]]:
    """Everything that waits, taken out: reason and count."""
    found = []
    while (waiting := backlog.take()) is not None:
        found.append((waiting.signal.reason, waiting.count))
    return found


def test_first_come_first_served() -> None:
    """What came first is taken first; what says the same counts at the first one's place."""
    backlog = Backlog(10)
    for at_ns, reason in enumerate("abac"):
        backlog.put(notice(reason, at_ns))
    assert (len(backlog), backlog.signals) == (3, 4)
    first = backlog.take()
    assert first is not None
    assert (first.signal.timestamp_ms, first.last_ns, first.count) == (0, 2, 2)
    assert drained(backlog) == [("b", 1), ("c", 1)]


def test_too_many_reasons_become_one_for_each_level() -> None:
    """Beyond the bound further signals of a level are counted in one notice, which keeps the first one's reason."""
    backlog = Backlog(2)
    for reason in "abcde":
        backlog.put(notice(reason))
    backlog.put(notice("f", level=HALT))
    backlog.put(notice("a"))
    assert drained(backlog) == [("a", 2), ("b", 1), ("c", 3), ("f", 1)]


def test_what_is_given_back_comes_next() -> None:
    """Together with what came meanwhile and says the same."""
    backlog = Backlog(10)
    for reason in "ab":
        backlog.put(notice(reason))
    taken = backlog.take()
    assert taken is not None
    backlog.put(notice("a"))
    backlog.give_back(taken)
    assert drained(backlog) == [("a", 2), ("b", 1)]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([NOTICE, HALT]))), st.integers(1, 4))
def test_nothing_is_lost_and_memory_is_bounded(signals: list[tuple[str, int]], reasons_max: int) -> None:
    """Counts add up to what was put in, however many, in at most one notice more for each level than the bound."""
    backlog = Backlog(reasons_max)
    for reason, level in signals:
        backlog.put(notice(reason, level=level))
        assert len(backlog) <= reasons_max + 2
    assert sum(count for _, count in drained(backlog)) == len(signals)


def test_a_signal_carries_its_checksum_and_a_bounded_reason() -> None:
    """The checksum holds until a byte of the payload changes."""
    signal = notice("x" * 5000, 3_000_000).signal
    assert (signal.version, signal.timestamp_ms, len(signal.reason)) == (1, 3, REASON_CHARACTERS_MAX)
    assert signal.payload_checksum == checksum(signal)
    signal.origin = VARIOUS
    assert signal.payload_checksum != checksum(signal)
