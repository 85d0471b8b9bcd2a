from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from structlog.testing import capture_logs

from support.collector import Collector, grpc_collector, http_collector
from tolaria.config import TelemetrySettings
from tolaria.telemetry.tracing import tracing

SERVER, CLIENT, INTERNAL = 2, 3, 1


@pytest.mark.parametrize(
    ("receive", "protocol"), [(http_collector, "http/protobuf"), (grpc_collector, "grpc")], ids=["http", "grpc"]
)
def test_spans_reach_a_collector_with_their_ids(
    receive: Callable[[], AbstractContextManager[Collector]], protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trace, parent, kind, failure, times and attributes are those recorded; headers are the environment's."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=lab")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    with receive() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        with capture_logs(), tracing(TelemetrySettings(), "tolaria") as tracer:
            root = tracer.begin()
            child = tracer.begin(root)
            tracer.record(child, "tamiyo/EvaluateEpoch", 0.25, "no answer", kind="client", outcome="timeout")
            tracer.record(root, "tolaria.epoch", 1.5, epoch=3)
            kept = tracer.take()
        epoch, call = sorted(
            collector.spans("tolaria.epoch", "tamiyo/EvaluateEpoch"), key=lambda span: span.name, reverse=True
        )
    assert (epoch.trace_id, epoch.span_id, epoch.parent_id) == (root.trace_id, root.span_id, "")
    assert (call.trace_id, call.span_id, call.parent_id) == (root.trace_id, child.span_id, root.span_id)
    assert (epoch.kind, epoch.failed, epoch.attributes) == (INTERNAL, False, {"epoch": "3"})
    assert (call.kind, call.failed) == (CLIENT, True)
    assert call.attributes == {"outcome": "timeout", "error": "no answer"}
    assert (epoch.duration_s, call.duration_s) == (1.5, 0.25)
    assert epoch.service == "tolaria"
    assert collector.headers[0].get("x-tenant") == "lab"
    assert [span.name for span in kept] == ["tamiyo/EvaluateEpoch", "tolaria.epoch"]  # packets have them, too


@pytest.mark.parametrize(("ratio", "count"), [("0", 0), ("1", 3)])
def test_the_sampler_of_the_environment_decides(ratio: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a whole trace: children, peers and remote parents follow the root."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", ratio)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-trainer")
    with http_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        with capture_logs(), tracing(TelemetrySettings(), "tolaria") as tracer:
            root = tracer.begin()
            assert root.sampled is bool(count)
            tracer.record(root, "a", 0.1)
            for _ in range(2):
                tracer.record(tracer.begin(root), "b", 0.1)
        found = collector.spans(*(("a", "b") if count else ()))
    assert [span.service for span in found] == ["my-trainer"] * count
