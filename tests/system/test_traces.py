"""Traces of a real service, its lane and its peers, as a collector receives them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from leyline.v1 import admin_service_pb2 as admin
from support.collector import ReceivedSpan, http_collector
from support.processes import serve, status, stub_of

SERVER, CLIENT = 2, 3
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.slow
def test_traces_are_linked_across_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch with its boundary and calls, as the peers see them; an operator's rollback; the death of the lane."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    with http_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        with serve("training.epochs=100000", cwd=tmp_path, reference_peers=True) as service, stub_of(service) as stub:
            collector.spans("tolaria.epoch", "kasmina/ExportSeedStates", "tolaria.checkpoint")
            request = admin.TriggerRollbackRequest(request_id="r-1", reason="practice")
            stub.TriggerRollback(request, timeout=180, metadata=(("traceparent", CALLER),))
            collector.spans("tolaria.rollback", "tamiyo/PrepareRollback")
            os.kill(status(stub).ranks[0].pid, signal.SIGKILL)
            spans = collector.spans("tolaria.lane_restart")
            service.terminate()
            service.wait()
    by_id = {(span.service, span.span_id): span for span in spans}
    boundary = one(spans, "tolaria.boundary", "tolaria")
    epoch = by_id["tolaria", boundary.parent_id]
    assert (epoch.name, epoch.parent_id) == ("tolaria.epoch", "")
    assert_linked(spans, "tamiyo/EvaluateEpoch", "tamiyo", {span.span_id for span in spans if "boundary" in span.name})
    rollback = one(spans, "tolaria.rollback", "tolaria")
    assert f"00-{rollback.trace_id}-{rollback.parent_id}-01" == CALLER
    for peer in ("tamiyo", "kasmina"):
        assert_linked(spans, f"{peer}/PrepareRollback", peer, {rollback.span_id})
    assert rollback.attributes["outcome"] == "restored"


def one(spans: list[ReceivedSpan], name: str, service: str) -> ReceivedSpan:
    """Returns the first span of that name from a service."""
    return next(span for span in spans if (span.name, span.service) == (name, service))


def assert_linked(spans: list[ReceivedSpan], name: str, peer: str, parents: set[str]) -> None:
    """The peer's span is a child of the call's, which is a child of one of `parents`."""
    served = one(spans, name, peer)
    call = next(span for span in spans if (span.service, span.span_id) == ("tolaria", served.parent_id))
    assert (call.name, call.trace_id, call.kind, served.kind) == (name, served.trace_id, CLIENT, SERVER)
    assert call.parent_id in parents
