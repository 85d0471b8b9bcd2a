"""Spans of the run: recorded when they end, kept for the next epoch's packet, and exported if that is asked for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import structlog

from leyline.v1.telemetry_pb2 import TraceSpan
from tolaria.config import TelemetrySettings, trace_environment
from tolaria.errors import ConfigurationError
from tolaria.values.spans import ERROR, TRACE_ID, SpanContext, new_span_id, new_trace_id

if TYPE_CHECKING:
    from tolaria.telemetry.otlp import OtlpExporter  # imports OpenTelemetry, which is not always installed

SPANS_MAX: Final = 512
"""Spans kept for the next packet; the oldest are left out of it."""

_CLOSE_S: Final = 1.0
_MISSING: Final = "traces need the extra tolaria[otel]"


class Tracer:
    """Records spans. Without an exporter they are only part of packets. Used on the event loop only."""

    def __init__(self, exporter: OtlpExporter | None = None) -> None:
        self._exporter = exporter
        self._ended: deque[TraceSpan] = deque(maxlen=SPANS_MAX)
        self.current: SpanContext | None = None
        """The epoch or boundary in which the run is, to which what it begins belongs."""

    @property
    def exports(self) -> bool:
        """Whether spans are exported."""
        return self._exporter is not None

    def begin(self, parent: SpanContext | None = None) -> SpanContext:
        """Returns the context of a span that begins now: a child of `parent`, or the root of a new trace."""
        if parent is not None:
            return parent.child()
        trace_id = new_trace_id()
        sampled = self._exporter is not None and self._exporter.samples(trace_id)
        return SpanContext(trace_id, new_span_id(), sampled=sampled)

    def record(
        self,
        span: SpanContext,
        name: str,
        duration_s: float,
        error: str = "",
        /,
        **attributes: str | float,
    ) -> None:
        """Records a span that ends now, after `duration_s`; with an `error` it has failed. Empty texts are left out."""
        end_ns = time.time_ns()
        attributes[ERROR] = error
        shown = {key: str(value) for key, value in attributes.items() if value != ""}
        message = TraceSpan(span_id=span.span_id, parent_span_id=span.parent_id, name=name, attributes=shown)
        message.attributes[TRACE_ID] = span.trace_id
        message.start_time.FromNanoseconds(end_ns - max(0, round(duration_s * 1e9)))
        message.end_time.FromNanoseconds(end_ns)
        self._ended.append(message)
        if self._exporter is not None and span.sampled:
            self._exporter.export(message)

    def take(self) -> list[TraceSpan]:
        """Returns the spans that have ended since the last call, at most SPANS_MAX."""
        taken = list(self._ended)
        self._ended.clear()
        return taken


@contextmanager
def tracing(settings: TelemetrySettings, service_name: str) -> Iterator[Tracer]:
    """Yields a tracer; it exports if settings and environment ask for it. At the end, sends what is left for a second.

    OpenTelemetry is not even imported otherwise.

    Raises ConfigurationError if `telemetry.traces` is on and tolaria[otel] is not installed.
    """
    environment = trace_environment()
    if settings.traces == "off" or not (settings.traces == "on" or environment.asked):
        yield Tracer()
        return
    try:
        from tolaria.telemetry.otlp import OtlpExporter  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        if settings.traces == "on":
            raise ConfigurationError([f"telemetry.traces: {_MISSING}, which is not installed: {error}"]) from None
        structlog.get_logger().warning("no_traces", detail=f"the environment asks for traces; {_MISSING}: {error}")
        yield Tracer()
        return
    exporter = OtlpExporter(service_name, environment)
    structlog.get_logger().info("traces", protocol=environment.protocol)
    try:
        yield Tracer(exporter)
    finally:
        exporter.close(_CLOSE_S)
