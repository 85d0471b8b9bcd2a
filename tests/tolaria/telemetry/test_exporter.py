from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import anyio
import pytest

from tolaria.config import Address
from tolaria.telemetry.exporter import Readiness, exporter
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
