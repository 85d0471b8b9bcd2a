from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from tolaria.config import TelemetrySettings
from tolaria.telemetry.tracing import SPANS_MAX, Tracer, tracing


def test_a_span_has_its_ids_times_and_attributes() -> None:
    """Times are Unix time; what the message has no field for is an attribute, and empty texts are left out."""
    tracer = Tracer()
    before_ns = time.time_ns()
    root = tracer.begin()
    child = tracer.begin(root)
    tracer.record(child, "tolaria.boundary", 0.25, "over budget", epoch=3, note="")
    (span,) = tracer.take()
    assert (span.name, span.span_id, span.parent_span_id) == ("tolaria.boundary", child.span_id, root.span_id)
    assert span.attributes == {"trace_id": root.trace_id, "epoch": "3", "error": "over budget"}
    assert span.end_time.ToNanoseconds() - span.start_time.ToNanoseconds() == 250_000_000
    assert before_ns <= span.end_time.ToNanoseconds() <= time.time_ns()
    assert tracer.take() == []


def test_the_number_of_spans_that_wait_is_bounded() -> None:
    """The latest are kept for the next packet."""
    tracer = Tracer()
    for number in range(SPANS_MAX + 5):
        tracer.record(tracer.begin(), str(number), 0.0)
    assert [span.name for span in tracer.take()] == [str(number) for number in range(5, SPANS_MAX + 5)]


def test_without_an_exporter_no_trace_is_sampled() -> None:
    """So no header is sent to peers."""
    assert not Tracer().begin().sampled
    assert not Tracer().exports


WITHOUT_THE_EXTRA = """
import sys
sys.modules["opentelemetry"] = None  # an import of it fails
from tolaria.config import TelemetrySettings
from tolaria.telemetry.tracing import tracing
with tracing(TelemetrySettings(traces=sys.argv[1]), "tolaria") as tracer:
    print("exports" if tracer.exports else "exports nothing")
"""


@pytest.mark.parametrize(
    ("traces", "endpoint", "out", "error"),
    [
        ("auto", "", "exports nothing", ""),
        ("off", "http://127.0.0.1:1", "exports nothing", ""),
        ("auto", "http://127.0.0.1:1", "exports nothing", ""),
        ("on", "", "", "telemetry.traces: traces need the extra tolaria[otel], which is not installed"),
    ],
)
def test_a_missing_extra_is_an_error_only_if_traces_are_on(traces: str, endpoint: str, out: str, error: str) -> None:
    """A cluster may set the variables for every container; then a warning is logged."""
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint} if endpoint else {}
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_EXTRA, traces],
        capture_output=True, text=True, timeout=180, check=False, env=environment,
    )  # fmt: skip
    assert ended.stdout.splitlines()[-1:] == ([out] if out else [])
    assert error in ended.stderr
    assert ("no_traces" in ended.stdout) is (traces == "auto" and bool(endpoint))


def test_nothing_of_opentelemetry_is_imported_unless_it_is_asked_for() -> None:
    """Neither when the service is imported, nor when it begins to trace without exporting."""
    code = (
        "import sys, tolaria.service, tolaria.reference.server\n"
        "from tolaria.config import TelemetrySettings\n"
        "from tolaria.telemetry.tracing import tracing\n"
        "with tracing(TelemetrySettings(), 'tolaria') as tracer: tracer.record(tracer.begin(), 'x', 0.0)\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True, env={}
    )
    assert ended.stdout.strip() == "[]"


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """Waits for the threads that the test has left behind: they open sockets, which other tests would count."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(180)


@pytest.mark.usefixtures("no_thread_is_left")
def test_an_unreachable_collector_delays_no_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be sent is lost after a second. The SDK warns with every attempt; one line of it is logged."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    with capture_logs() as lines, tracing(TelemetrySettings(), "tolaria") as tracer:
        tracer.record(tracer.begin(), "x", 0.0)
        assert tracer.exports
        until_s = time.monotonic() + 180
        while not any(line["event"] == "traces_not_sent" for line in lines):
            assert time.monotonic() < until_s
            time.sleep(0.01)
        logging.getLogger("opentelemetry.exporter").warning("once more")
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 20  # the exporter's own timeout and retries take longer
    assert [line["event"] for line in lines].count("traces_not_sent") == 1


@pytest.mark.usefixtures("no_thread_is_left")
def test_traces_that_are_on_need_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector's standard address is on this machine."""
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    with capture_logs(), tracing(TelemetrySettings(traces="on"), "tolaria") as tracer:
        assert tracer.exports
