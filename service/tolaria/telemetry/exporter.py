"""The HTTP server of /metrics for Prometheus and of /livez, /healthz and /readyz for health probes."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import anyio.to_thread
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from tolaria.config import MetricsSettings
from tolaria.telemetry.metrics import Metrics, with_counters
from tolaria.telemetry.web_server import AUTHENTICATED, WebGuard


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the service is ready: the reasons why it is not, if any, and details worth knowing either way."""

    reasons: list[str]
    details: list[str]

    @property
    def ready(self) -> bool:
        """Whether there is no reason against it."""
        return not self.reasons


@asynccontextmanager
async def exporter(
    sockets: Sequence[socket.socket],
    metrics: Metrics,
    readiness: Callable[[], Readiness],
    guard: WebGuard | None = None,
) -> AsyncIterator[None]:
    """Serves on listening sockets, which it closes, until the context exits. `readiness` is called from any thread."""
    metrics.health_ready.set_function(lambda: readiness().ready)
    guard = guard or WebGuard(None, metrics, MetricsSettings().connections_max)
    async with guard.serving(_application(metrics, readiness), sockets):
        yield


def _application(metrics: Metrics, readiness: Callable[[], Readiness]) -> web.Application:
    one_at_a_time = anyio.CapacityLimiter(1)

    async def render(request: web.Request) -> web.Response:
        encode, content_type = _encoder(request.headers.get("Accept", ""))
        # In a thread: rendering takes milliseconds, which would count against the budget of an epoch boundary.
        body = await anyio.to_thread.run_sync(encode, metrics.registry, limiter=one_at_a_time)
        if content_type.startswith("text/plain"):
            body = with_counters(body)
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def live(_request: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def ready(request: web.Request) -> web.Response:
        found = readiness()
        answer: dict[str, object] = {"ready": found.ready}
        if request[AUTHENTICATED]:
            answer |= {"reasons": found.reasons, "details": found.details}
        return web.json_response(answer, status=200 if found.ready else 503)

    application = web.Application()
    application.add_routes([web.get("/metrics", render), web.get("/livez", live), web.get("/readyz", ready)])
    application.add_routes([web.get("/healthz", live)])  # the older name of /livez
    return application


def _encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """The encoder and content type for an Accept header; plain text if the library cannot parse the header."""
    try:
        encode, content_type = choose_encoder(accept)
        content_type.encode("ascii")  # it contains the requested version, which may be any text
    except (TypeError, ValueError):
        return choose_encoder("")
    return encode, content_type
