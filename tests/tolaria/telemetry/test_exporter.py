from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import aiohttp
import anyio
import anyio.to_thread
import pytest
from prometheus_client import Metric
from prometheus_client.exposition import generate_latest

from tolaria.config import Address
from tolaria.telemetry.exporter import Readiness, Renderer, exporter
from tolaria.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio


def ready() -> Readiness:
    """The service is ready, and there is nothing to mention."""
    return Readiness([], [])


@asynccontextmanager
async def serving(metrics: Metrics, readiness: Callable[[], Readiness]) -> AsyncIterator[Address]:
    """Serves on a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    async with exporter([listener], metrics, readiness):
        yield Address(*listener.getsockname())


async def get(address: Address, path: str) -> tuple[int, str]:
    """Status and body of a response."""
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}{path}") as response:
        return response.status, await response.text()


async def test_metrics_and_probes_are_served() -> None:
    """/metrics has the time series, /livez and /readyz answer 200, other paths 404."""
    metrics = Metrics()
    metrics.training_step.set(7)
    async with serving(metrics, ready) as address:
        status, text = await get(address, "/metrics")
        assert status == 200
        assert "tolaria_training_step 7.0" in text
        assert (await get(address, "/livez"))[0] == 200
        assert (await get(address, "/readyz"))[0] == 200
        assert (await get(address, "/nothing"))[0] == 404


@pytest.mark.parametrize(("reasons", "answers"), [([], 200), (["the run is failed: no disk"], 503)])
async def test_readyz_answers_with_reasons_and_details(reasons: list[str], answers: int) -> None:
    """A reason makes the probe fail, a detail does not; the metric says the same as the probe."""
    found = Readiness(reasons, ["the lane has been evaluating for 45 s"])
    async with serving(Metrics(), lambda: found) as address:
        status, text = await get(address, "/readyz")
        _, metrics = await get(address, "/metrics")
    assert status == answers
    assert json.loads(text) == {"ready": not reasons, "reasons": reasons, "details": found.details}
    assert f"\ntolaria_health_ready {float(not reasons)}\n" in metrics


async def scrape(address: Address, accept: bytes) -> tuple[bytes, bytes]:
    """Head and body of the response to a request with this Accept header, which may be malformed."""
    async with await anyio.connect_tcp(address.host, address.port) as stream:
        await stream.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAccept: " + accept + b"\r\n\r\n")
        head, _, body = b"".join([part async for part in stream]).partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize(
    "accept",
    [
        b"text/plain;version=abc",
        b"text/plain;version=1.x",
        b'text/plain;version="1.0.0"',
        b"application/openmetrics-text;version=abc",
        b"application/openmetrics-text;version=9.\x80",
        "application/openmetrics-text;version=\uff19".encode(),
        b"application/openmetrics-text;version=" + b"9" * 5000,
        b"text/plain;version=",
        b";=;,,;version;=version,",
        b"image/png",
        b"\xff\xfe",
        b"",
    ],
)
async def test_invalid_accept_header_gets_plain_text(accept: bytes) -> None:
    """Metrics are served in the oldest format if the Accept header cannot be parsed."""
    async with serving(Metrics(), ready) as address:
        head, body = await scrape(address, accept)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"Content-Type: text/plain; version=0.0.4; charset=utf-8" in head
    assert b"tolaria_training_step 0.0" in body


async def test_metrics_of_the_process_are_served() -> None:
    """Memory, CPU time and descriptors, under the names that every Prometheus client gives them."""
    async with serving(Metrics(), ready) as address:
        _, text = await get(address, "/metrics")
    names = ("process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds")
    assert [name for name in names if not re.search(rf"^{name} [1-9]", text, re.MULTILINE)] == []


class CountedMetrics(Metrics):
    """Metrics that are read in a thread only while `gate` is set; counts how often they are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.entered = threading.Event(), threading.Event()
        self.threads: list[str] = []

    def collected(self, pause: Callable[[float], None] = time.sleep) -> Iterator[Metric]:
        self.threads.append(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(180)
        return super().collected(pause)


async def test_rendering_does_not_hold_up_the_event_loop() -> None:
    """It happens in a thread, one response at a time; requests that wait share the next one, with newer values."""
    metrics = CountedMetrics()
    texts: list[str] = []

    async def scrape_once(address: Address) -> None:
        texts.append((await get(address, "/metrics"))[1])

    async with serving(metrics, ready) as address, anyio.create_task_group() as tasks:
        tasks.start_soon(scrape_once, address)
        await anyio.to_thread.run_sync(metrics.entered.wait, 10)
        metrics.training_step.set(7)
        for _ in range(20):
            tasks.start_soon(scrape_once, address)
        assert (await get(address, "/livez"))[0] == 200  # the event loop answers meanwhile
        metrics.gate.set()
    assert threading.current_thread().name not in metrics.threads
    assert 2 <= len(metrics.threads) <= 3  # requests may arrive after the second one has begun
    assert sum("\ntolaria_training_step 7.0" in text for text in texts) >= 20


async def test_a_cancelled_request_leaves_others_their_response() -> None:
    """One of those that wait has the metrics rendered instead."""
    renderer = Renderer(metrics := CountedMetrics())
    bodies: list[bytes] = []

    async def ask() -> None:
        bodies.append(await renderer.body(generate_latest, "text/plain"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.to_thread.run_sync(metrics.entered.wait, 10)
        async with anyio.create_task_group() as cancelled:
            cancelled.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            cancelled.cancel_scope.cancel()
        metrics.gate.set()
    assert len(bodies) == 2
    assert all(b"tolaria_training_step" in body for body in bodies)
