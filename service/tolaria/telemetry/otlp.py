"""Export of recorded spans through OpenTelemetry's SDK, which batches and sends them in a thread.

The SDK reads the OTEL_* variables for endpoint, headers, sampling, limits, batches and resource attributes.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Final

import structlog
from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import NonRecordingSpan, SpanKind, Status, StatusCode, TraceFlags

from leyline.v1.telemetry_pb2 import TraceSpan
from tolaria import __version__
from tolaria.config import TraceEnvironment
from tolaria.values.spans import ERROR, KIND, TRACE_ID

LOG_INTERVAL_S: Final = 600.0
"""Seconds between two log lines about traces that cannot be sent."""

_KINDS: Final = {"client": SpanKind.CLIENT, "server": SpanKind.SERVER}


class OtlpExporter:
    """Sends spans to the collector that the environment names. Calls return at once; what cannot be sent is lost."""

    def __init__(self, service_name: str, environment: TraceEnvironment) -> None:
        resource = {SERVICE_VERSION: __version__}
        if not environment.service_name:  # what is given here overrides the environment
            resource[SERVICE_NAME] = service_name
        self._ids = _GivenIds()
        self._log = _SeldomLogged()
        logger = logging.getLogger("opentelemetry")
        logger.addHandler(self._log)
        logger.propagate = False
        self._provider = TracerProvider(
            resource=Resource.create(resource), id_generator=self._ids, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(_sender(environment)))
        self._tracer = self._provider.get_tracer("tolaria", __version__)

    def samples(self, trace_id: str) -> bool:
        """Whether the sampler of the environment takes a trace that begins here."""
        decision = self._provider.sampler.should_sample(None, int(trace_id, 16), "trace").decision
        return decision is Decision.RECORD_AND_SAMPLE

    def export(self, span: TraceSpan) -> None:
        """Queues a span of a trace that is sampled; its ids stay as they are."""
        attributes = dict(span.attributes)
        trace_id, error = int(attributes.pop(TRACE_ID), 16), attributes.get(ERROR, "")
        kind = _KINDS.get(attributes.pop(KIND, ""), SpanKind.INTERNAL)
        self._ids.trace_id, self._ids.span_id = trace_id, int(span.span_id, 16)
        context = None
        if span.parent_span_id:
            parent = trace.SpanContext(
                trace_id, int(span.parent_span_id, 16), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)
            )
            context = trace.set_span_in_context(NonRecordingSpan(parent))
        started = self._tracer.start_span(
            span.name, context, kind, attributes, start_time=span.start_time.ToNanoseconds()
        )
        if error:
            started.set_status(Status(StatusCode.ERROR, error))
        started.end(span.end_time.ToNanoseconds())

    def close(self, timeout_s: float) -> None:
        """Sends what is queued, and gives up after `timeout_s`: a collector that does not answer delays no exit."""
        closing = threading.Thread(target=self._provider.shutdown, name="tolaria-traces", daemon=True)
        closing.start()
        closing.join(timeout_s)
        logger = logging.getLogger("opentelemetry")
        logger.removeHandler(self._log)
        logger.propagate = True


class _SeldomLogged(logging.Handler):
    """Logs the SDK's warnings, which come with every batch that a collector does not take, at intervals only."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._logged_at_s = -math.inf
        self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Logs a record, with the number of those that were left out since the last one."""
        now_s = time.monotonic()
        if now_s - self._logged_at_s < LOG_INTERVAL_S:
            self._left_out += 1
            return
        structlog.get_logger().warning("traces_not_sent", detail=record.getMessage(), further_lines=self._left_out)
        self._logged_at_s, self._left_out = now_s, 0


class _GivenIds(IdGenerator):
    """Gives the next span the ids that it has been recorded with."""

    def __init__(self) -> None:
        self.trace_id, self.span_id = 0, 0

    def generate_trace_id(self) -> int:
        """Returns the trace's id."""
        return self.trace_id

    def generate_span_id(self) -> int:
        """Returns the span's id."""
        return self.span_id


def _sender(environment: TraceEnvironment) -> SpanExporter:
    # ruff: noqa: PLC0415 - each protocol has a package, of which the other one may not be installed
    if environment.console:
        return ConsoleSpanExporter()
    if environment.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter()
