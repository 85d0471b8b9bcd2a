"""The HTTP server of /metrics for Prometheus, of /livez, /healthz and /readyz for health probes, and of more routes."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
from aiohttp import web
from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

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
    routes: Sequence[web.RouteDef] = (),
) -> AsyncIterator[None]:
    """Serves on listening sockets, which it closes, until the context exits. `readiness` is called from any thread.

    `routes` are served beside those of metrics and probes, behind the same guard.
    """
    metrics.health_ready.set_function(lambda: readiness().ready)
    guard = guard or WebGuard(None, metrics, MetricsSettings().connections_max)
    application = _application(metrics, readiness)
    application.add_routes(routes)
    async with guard.serving(application, sockets):
        yield


def _application(metrics: Metrics, readiness: Callable[[], Readiness]) -> web.Application:
    renderer = Renderer(metrics)

    async def render(request: web.Request) -> web.Response:
        encode, content_type = _encoder(request.headers.get("Accept", ""))
        body = await renderer.body(encode, content_type)
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


class AllMetrics(Collector):
    """The metrics as encoders want them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yields them; for a thread."""
        return self._metrics.collected()


@dataclass(slots=True)
class _Rendering:
    """A response that will be rendered; `over` is set once it is, or has failed."""

    over: anyio.Event = field(default_factory=anyio.Event)
    body: bytes | None = None


class Renderer:
    """Renders metrics in a thread, since it takes many milliseconds, one response at a time.

    Requests that wait for their turn get the same response, which is rendered after all of them have arrived.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = AllMetrics(metrics)
        self._one_at_a_time = anyio.CapacityLimiter(1)
        self._next: dict[str, _Rendering] = {}

    async def body(self, encode: Callable[[Collector], bytes], content_type: str) -> bytes:
        """Returns all metrics in a format."""
        while True:
            rendering = self._next.get(content_type)
            if rendering is None:
                return await self._render(encode, content_type)
            await rendering.over.wait()
            if rendering.body is not None:  # else the request that had it rendered was cancelled
                return rendering.body

    async def _render(self, encode: Callable[[Collector], bytes], content_type: str) -> bytes:
        rendering = self._next[content_type] = _Rendering()
        try:
            async with self._one_at_a_time:
                del self._next[content_type]  # what arrives from now on needs newer values
                is_plain = content_type.startswith("text/plain")
                rendering.body = await anyio.to_thread.run_sync(_encoded, encode, self._metrics, is_plain)
            return rendering.body
        finally:
            if self._next.get(content_type) is rendering:
                del self._next[content_type]
            rendering.over.set()


def _encoded(encode: Callable[[Collector], bytes], metrics: Collector, is_plain: bool) -> bytes:
    return with_counters(encode(metrics)) if is_plain else encode(metrics)


def _encoder(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    """The encoder and content type for an Accept header; plain text if the library cannot parse the header."""
    try:
        encode, content_type = choose_encoder(accept)
        content_type.encode("ascii")  # it contains the requested version, which may be any text
    except (TypeError, ValueError):
        return choose_encoder("")
    return encode, content_type
