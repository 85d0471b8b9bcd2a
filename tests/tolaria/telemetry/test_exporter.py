from __future__ import annotations

import json

import aiohttp
import anyio
import pytest

from tolaria.config import Address
from tolaria.errors import BindError
from tolaria.telemetry.exporter import exporter
from tolaria.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio


async def get(address: object, path: str) -> tuple[int, str]:
    """Status and body of a page."""
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}{path}") as response:
        return response.status, await response.text()


async def test_metrics_and_probes_are_served() -> None:
    """/metrics has the series, /livez is there, /readyz says yes."""
    metrics = Metrics()
    metrics.training_step.set(7)
    async with exporter("127.0.0.1:0", metrics, list) as address:
        status, text = await get(address, "/metrics")
        assert status == 200
        assert "tolaria_training_step 7.0" in text
        assert (await get(address, "/livez"))[0] == 200
        assert (await get(address, "/readyz"))[0] == 200
        assert (await get(address, "/nothing"))[0] == 404


async def test_not_ready_says_why() -> None:
    """A probe that fails tells the reason to whoever looks."""
    async with exporter("127.0.0.1:0", Metrics(), lambda: ["the run is failed: no disk"]) as address:
        status, text = await get(address, "/readyz")
    assert status == 503
    assert json.loads(text) == {"ready": False, "reasons": ["the run is failed: no disk"]}


async def test_a_port_in_use_is_a_bind_error_with_the_address() -> None:
    """The message names what could not listen and where."""
    async with exporter("127.0.0.1:0", Metrics(), list) as address:
        with pytest.raises(BindError, match=f"the metrics server cannot listen on {address}: "):
            async with exporter(str(address), Metrics(), list):
                pass


async def scraped(address: Address, accept: bytes) -> tuple[bytes, bytes]:
    """Head and body of a scrape with this Accept header, sent as it is."""
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
async def test_a_scraper_that_asks_for_nonsense_gets_plain_text(accept: bytes) -> None:
    """Whatever Accept holds, the metrics are served, in the oldest form."""
    async with exporter("127.0.0.1:0", Metrics(), list) as address:
        head, body = await scraped(address, accept)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"Content-Type: text/plain; version=0.0.4; charset=utf-8" in head
    assert b"tolaria_training_step 0.0" in body
