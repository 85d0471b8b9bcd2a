"""Places in a trace: ids as OpenTelemetry defines them, and the header in which W3C Trace Context sends them.

A span is recorded when it ends, as a `TraceSpan`; until then all that exists of it is its `SpanContext`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

TRACEPARENT: Final = "traceparent"
"""The header, which is lower case in gRPC metadata."""

TRACE_ID, ERROR, KIND = "trace_id", "error", "kind"
"""Attributes of spans for which Leyline's message has no field; `KIND` is client or server, if there is one."""

_HEADER: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_HEADER_LENGTH_MAX: Final = 512
_SAMPLED: Final = 1


@dataclass(frozen=True, slots=True)
class SpanContext:
    """The ids of a span in lower-case hex, and of its parent (empty for the root). `sampled`: the trace is exported."""

    trace_id: str
    span_id: str
    parent_id: str = ""
    sampled: bool = False

    def child(self) -> SpanContext:
        """Returns the context of a new span under this one."""
        return SpanContext(self.trace_id, new_span_id(), self.span_id, self.sampled)

    @property
    def traceparent(self) -> str:
        """The value of the header that makes the receiver's spans children of this one."""
        return f"00-{self.trace_id}-{self.span_id}-{_SAMPLED * self.sampled:02x}"


_current: ContextVar[SpanContext | None] = ContextVar("span", default=None)


def current_span() -> SpanContext | None:
    """Returns the span that calls belong to here; None outside of `within`."""
    return _current.get()


@contextmanager
def within(span: SpanContext | None) -> Iterator[None]:
    """Makes calls inside the block, and in tasks started there, belong to `span`."""
    token = _current.set(span)
    try:
        yield
    finally:
        _current.reset(token)


def new_trace_id() -> str:
    """Returns a random trace id. The global generator is the job's and is left alone."""
    return secrets.token_hex(16)


def new_span_id() -> str:
    """Returns a random span id."""
    return secrets.token_hex(8)


def remote_parent(metadata: Iterable[tuple[str, str | bytes]]) -> SpanContext | None:
    """Returns the caller's span from the metadata of a call; None without a valid header, as W3C prescribes."""
    for key, value in metadata:
        if key == TRACEPARENT and isinstance(value, str) and len(value) <= _HEADER_LENGTH_MAX:
            return _parsed(value)
    return None


def _parsed(header: str) -> SpanContext | None:
    match = _HEADER.fullmatch(header)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    valid = version != "ff" and (version != "00" or more is None) and int(trace_id, 16) and int(span_id, 16)
    return SpanContext(trace_id, span_id, sampled=bool(int(flags, 16) & _SAMPLED)) if valid else None
