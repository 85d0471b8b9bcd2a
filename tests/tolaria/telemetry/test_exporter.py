from __future__ import annotations

import json

import aiohttp
import pytest

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
