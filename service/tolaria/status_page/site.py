"""The status page over HTTP: its files, and the stream of its frames to viewers, whose number is bounded."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Final

import anyio
from aiohttp import web

from tolaria.errors import JournalError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.status_page.frames import INTERVAL_S, Frames
from tolaria.status_page.history import PageHistory
from tolaria.status_page.sections import ROWS_MAX, PageParts, Sections
from tolaria.telemetry.metrics import Metrics

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The Content-Security-Policy: no script and no style but the files of the page, no text as markup."""

HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
FILES: Final = {
    "index.html": "text/html",
    "page.css": "text/css",
    "icon.svg": "image/svg+xml",
    "page.js": "text/javascript",
    "stream.js": "text/javascript",
    "overview.js": "text/javascript",
    "charts.js": "text/javascript",
    "seeds.js": "text/javascript",
    "tables.js": "text/javascript",
    "dom.js": "text/javascript",
}
SLOW_S: Final = 10.0
"""Time for a viewer to take a frame; a slower one is dropped."""

BUFFER_BYTES: Final = 64 * 1024
"""Size of the buffer that the system has for one viewer."""

SPACING_S: Final = 0.01
"""Least time between two requests that are answered: viewers that ask flat out wait."""

RETRY_MS: Final = 2000
"""Time after which a browser connects again."""

_END: Final = b"event: end\ndata: {}\n\n"
"""The service is about to end."""


class StatusPage:
    """The page of one run. Used on the event loop only, except for its construction.

    Args:
        parts: what it shows.
        journal: read when something has been written to it, and a viewer is there.
        metrics: counts viewers.
        closing: set when the service is about to end: streams end too, and say so.
        viewers_max: returns the number of viewers at the same time; a further one is refused. 0: there is no page.
    """

    def __init__(
        self,
        parts: PageParts,
        journal: AsyncJournal,
        metrics: Metrics,
        *,
        closing: anyio.Event,
        viewers_max: Callable[[], int],
    ) -> None:
        self._sections = Sections(parts)
        self.frames = Frames(self._sections.builders, parts.history.curves)
        self._history: PageHistory = parts.history
        self._journal = journal
        self._metrics = metrics
        self._closing = closing
        self._viewers_max = viewers_max
        self._viewers = 0
        self._next_s = 0.0
        self._wanted = anyio.Event()
        self._files = {} if viewers_max() == 0 else {name: _file(name) for name in FILES}
        metrics.page_viewers.set(0)
        metrics.page_viewers_dropped_total.inc(0)

    def routes(self) -> Sequence[web.RouteDef]:
        """Returns the routes to add to the metrics server."""
        if not self._files:
            return []
        return [
            web.get("/", self._index),
            web.get("/page/events", self._events, allow_head=False),
            web.get("/page/{name}", self._static),
        ]

    async def follow_journal(self) -> None:
        """Reads the journal again whenever it may have changed and a viewer is there; until cancelled."""
        read = -1
        while True:
            if self._viewers == 0:
                await self._wanted.wait()
            if read != self._history.journalled or self._journal.waiting or self._sections.rows.failure:
                read = self._history.journalled
                await self._read_journal()
            await anyio.sleep(INTERVAL_S)

    async def _read_journal(self) -> None:
        rows = self._sections.rows
        try:
            rows.incidents = await self._journal.incidents(ROWS_MAX)
            rows.checkpoints = await self._journal.kept_points()
        except JournalError as error:
            rows.failure = str(error)
        else:
            rows.failure = ""

    # -- requests ----------------------------------------------------------------------------------------------------

    async def _index(self, request: web.Request) -> web.StreamResponse:
        await self._pace()
        return self._answer(request, "index.html")

    async def _static(self, request: web.Request) -> web.StreamResponse:
        await self._pace()
        name = request.match_info["name"]
        if name not in self._files:
            raise web.HTTPNotFound
        return self._answer(request, name)

    def _answer(self, request: web.Request, name: str) -> web.Response:
        body, tag = self._files[name]
        headers = {**HEADERS, "Cache-Control": "no-cache", "ETag": tag}
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=FILES[name], charset="utf-8", headers=headers)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        await self._pace()
        if self._viewers >= (viewers_max := self._viewers_max()):
            text = f"there are {viewers_max} viewers already (metrics.viewers_max)\n"
            return web.Response(status=503, text=text, headers={**HEADERS, "Retry-After": "5"})
        response = web.StreamResponse(headers={**HEADERS, "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream"
        self._viewers += 1
        self._metrics.page_viewers.set(self._viewers)
        self._wanted.set()
        try:
            _shrink_buffer(request)
            await response.prepare(request)
            await self._send_frames(request, response)
        except ConnectionError:
            pass  # the viewer has left
        finally:
            self._viewers -= 1
            self._metrics.page_viewers.set(self._viewers)
            if self._viewers == 0:
                self._wanted = anyio.Event()
        return response

    async def _send_frames(self, request: web.Request, response: web.StreamResponse) -> None:
        """Sends what the viewer has missed and then each new frame, until the service ends or the viewer is dropped."""
        frames, seen = self.frames, self.frames.number_of(request.headers.get("Last-Event-ID", ""))
        first, taken_s = f"retry: {RETRY_MS}\n\n".encode(), anyio.current_time()
        while True:
            last = self._closing.is_set()
            await frames.refresh(at_once=last)
            if (transport := request.transport) is None:  # the viewer has left
                return
            if transport.get_write_buffer_size() == 0:  # the viewer has taken the frame before
                data = first + frames.after(seen) + (_END if last else b"")
                first, seen = b"", frames.number
                if data and not await _written(response, data):
                    self._drop(request)
                    return
                taken_s = anyio.current_time()
            elif anyio.current_time() - taken_s > SLOW_S:
                self._drop(request)
                return
            if last:
                return
            with anyio.move_on_after(INTERVAL_S):
                await self._closing.wait()

    def _drop(self, request: web.Request) -> None:
        self._metrics.page_viewers_dropped_total.inc()
        if request.transport is not None:
            request.transport.abort()

    async def _pace(self) -> None:
        """Waits for the turn of a request."""
        now_s = anyio.current_time()
        self._next_s = max(now_s, self._next_s + SPACING_S)
        if self._next_s > now_s:
            await anyio.sleep(self._next_s - now_s)


async def _written(response: web.StreamResponse, data: bytes) -> bool:
    """Writes to a viewer; returns whether it took the data in time. Raises ConnectionError if it has left."""
    with anyio.move_on_after(SLOW_S):
        await response.write(data)
        return True
    return False


def _shrink_buffer(request: web.Request) -> None:
    """Has the system keep little for a viewer that does not read: it would be noticed after minutes."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)


def _file(name: str) -> tuple[bytes, str]:
    """Returns a file of the page and its entity tag."""
    body = files("tolaria.status_page").joinpath("assets", name).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'
