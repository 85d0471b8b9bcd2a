"""The HTTP server for Prometheus and for probes: /metrics, /livez, /readyz.

Owns its socket and the rendering. Must not know what readiness is made of.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from tolaria.config import Address
from tolaria.errors import BindError
from tolaria.telemetry.metrics import Metrics

Readiness = Callable[[], list[str]]
"""Returns the reasons why the service is not ready, in words; none: it is."""


@asynccontextmanager
async def exporter(listen: str, metrics: Metrics, readiness: Readiness) -> AsyncIterator[Address]:
    """Serve until the block ends; yields the address with its real port.

    Raises:
        BindError: when `listen` cannot be had.
    """
    wanted = Address.parse(listen)
    # A scrape in flight when the service stops gets a second to end.
    runner = web.AppRunner(_application(metrics, readiness), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, wanted.host, wanted.port)
        try:
            await site.start()
        except OSError as error:
            raise BindError("the metrics server", listen, error.strerror or str(error)) from None
        yield Address(wanted.host, int(runner.addresses[0][1]))
    finally:
        with anyio.CancelScope(shield=True):
            await runner.cleanup()


def _application(metrics: Metrics, readiness: Readiness) -> web.Application:
    one_at_a_time = anyio.CapacityLimiter(1)

    async def render(request: web.Request) -> web.Response:
        encode, content_type = _encoder(request.headers.get("Accept", ""))
        # Off the loop: a few hundred series take milliseconds, and boundaries are counted in them.
        body = await anyio.to_thread.run_sync(encode, metrics.registry, limiter=one_at_a_time)
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def live(_request: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def ready(_request: web.Request) -> web.Response:
        reasons = readiness()
        return web.json_response({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)

    application = web.Application()
    application.add_routes([web.get("/metrics", render), web.get("/livez", live), web.get("/readyz", ready)])
    return application


def _encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """The form that is asked for, and its content type; plain text where the library cannot make sense of it."""
    try:
        encode, content_type = choose_encoder(accept)
        content_type.encode("ascii")  # it repeats the version as it was asked for
    except (TypeError, ValueError):
        return choose_encoder("")
    return encode, content_type
