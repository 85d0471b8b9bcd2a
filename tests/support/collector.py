"""A collector of traces: a receiver of OTLP over HTTP or gRPC on loopback, in threads of the test."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as a collector gets it; ids are in hex."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    failed: bool
    attributes: dict[str, str]
    duration_s: float


class Collector:
    """What has been received so far."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.headers: list[dict[str, str]] = []
        self._spans: list[ReceivedSpan] = []
        self._changed = threading.Condition()

    def receive(self, request: ExportTraceServiceRequest, headers: dict[str, str]) -> None:
        """Adds the spans of a request."""
        with self._changed:
            self.headers.append(headers)
            for resource in request.resource_spans:
                service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
                self._spans += [_received(service, span) for scope in resource.scope_spans for span in scope.spans]
            self._changed.notify_all()

    def spans(self, *names: str, timeout_s: float = 300.0) -> list[ReceivedSpan]:
        """Waits until a span of each name has been received; returns all spans so far."""
        with self._changed:
            found = self._changed.wait_for(lambda: {span.name for span in self._spans} >= set(names), timeout_s)
            assert found, f"waited for {names}, got {sorted({span.name for span in self._spans})}"
            return list(self._spans)


def _received(service: str, span: Any) -> ReceivedSpan:
    return ReceivedSpan(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind,
        span.status.code == 2,
        {attribute.key: attribute.value.string_value for attribute in span.attributes},
        (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
    )


@contextmanager
def http_collector() -> Iterator[Collector]:
    """Receives OTLP over HTTP while the block runs."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                collector.receive(ExportTraceServiceRequest.FromString(body), dict(self.headers))
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    collector.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join(180)


@contextmanager
def grpc_collector() -> Iterator[Collector]:
    """Receives OTLP over gRPC while the block runs."""
    collector = Collector()

    class Servicer(TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the library's name
            collector.receive(request, dict(context.invocation_metadata()))
            return ExportTraceServiceResponse()

    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        add_TraceServiceServicer_to_server(Servicer(), server)  # type: ignore[no-untyped-call] # of the library
        collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield collector
        finally:
            server.stop(1).wait()
