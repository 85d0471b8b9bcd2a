from __future__ import annotations

import pytest

from tolaria.values.spans import SpanContext, current_span, new_span_id, new_trace_id, remote_parent, within

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_child_belongs_to_the_same_trace() -> None:
    """It has an id to itself, and the parent's as its parent's."""
    root = SpanContext(new_trace_id(), new_span_id(), sampled=True)
    child = root.child()
    assert (child.trace_id, child.parent_id, child.sampled) == (root.trace_id, root.span_id, True)
    assert child.span_id not in {root.span_id, root.child().span_id}
    assert root.parent_id == ""


def test_the_header_is_that_of_the_w3c() -> None:
    """The example of the recommendation, in both directions."""
    header = f"00-{TRACE}-{SPAN}-01"
    parent = remote_parent([("user-agent", "x"), ("traceparent", header)])
    assert parent == SpanContext(TRACE, SPAN, sampled=True)
    assert parent.traceparent == header
    assert SpanContext(TRACE, SPAN).traceparent == f"00-{TRACE}-{SPAN}-00"


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        (f"00-{TRACE}-{SPAN}-00", True),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", True),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        (f"00-{TRACE}-{SPAN}", False),
        (f"00-{TRACE}-{SPAN}-01\n", False),
        (f"cc-{TRACE}-{SPAN}-01-" + "x" * 600, False),
        ("", False),
        (b"00", False),
    ],
)
def test_an_invalid_header_is_ignored(value: str | bytes, valid: bool) -> None:
    """As the recommendation prescribes: the receiver begins a new trace."""
    assert (remote_parent([("traceparent", value)]) is not None) is valid


def test_calls_belong_to_the_innermost_span() -> None:
    """Inside of a block, and no longer after it."""
    outer, inner = SpanContext(TRACE, SPAN), SpanContext(TRACE, new_span_id())
    assert current_span() is None
    with within(outer):
        with within(inner):
            assert current_span() is inner
        assert current_span() is outer
    assert current_span() is None
