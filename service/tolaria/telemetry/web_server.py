"""What guards the metrics server: TLS, passwords, and limits on connections and on slow or silent clients."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import anyio
import anyio.to_thread
import bcrypt
from aiohttp import web
from aiohttp.typedefs import Handler

from tolaria.security.watched import WatchedFiles
from tolaria.security.web_config import WebConfig
from tolaria.telemetry.metrics import Metrics

OPEN_PATHS: Final = frozenset({"/livez", "/healthz", "/readyz"})
"""Paths without a password: probes have none. `/readyz` then says whether, and not why."""

AUTHENTICATED: Final = web.RequestKey("authenticated", bool)
"""Whether the client may see everything."""

SILENT_S: Final = 15.0
"""Seconds for a connection to send a whole request, also the first one."""

SEND_S: Final = 10.0
"""Seconds for a client to take a response."""

HANDSHAKE_S: Final = 10.0

PAUSE: Final = 4.0
"""Pause after metrics have been rendered, as a multiple of the time that it took: scrapers that ask flat out wait."""

PAUSE_S_MAX: Final = 0.5
_CHECKS_MAX, _CACHED_MAX = 8, 100
_NO_SUCH_USER: Final = b"$2b$10$Ax1g5RpBRVUF4LLO3JjdFuhw7fNW/YVuGkeomEq0h0ed8a65sjMgO"
"""Compared with for unknown users, so that they take as long as known ones."""


class WebGuard:
    """The guard of one metrics server, by its web config, if there is one. Used on the event loop only."""

    def __init__(self, config: WatchedFiles[WebConfig] | None, metrics: Metrics, connections_max: int) -> None:
        self._config = config
        self._metrics = metrics
        self.connections_max = connections_max
        self._passwords = _Passwords()
        self._rested_s = 0.0

    @property
    def scheme(self) -> str:
        """The scheme of addresses of this server: https with TLS, else http."""
        return "http" if self._config is None or self._config.value.context is None else "https"

    @asynccontextmanager
    async def serving(self, application: web.Application, sockets: Sequence[socket.socket]) -> AsyncIterator[None]:
        """Serves the application on listening sockets, which it closes, until the context exits."""
        application.middlewares.append(self._guarded)
        application.on_response_prepare.append(self._add_headers)
        # A request in flight at the exit has a second to complete.
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0, keepalive_timeout=SILENT_S)
        await runner.setup()
        async with AsyncExitStack() as stack:
            stack.push_async_callback(_shielded, runner.cleanup)
            for bound in sockets:
                server = await self._listen(runner, bound)
                stack.callback(server.close)
            yield

    async def _listen(self, runner: web.AppRunner, bound: socket.socket) -> asyncio.Server:
        requests = runner.server
        assert requests is not None  # noqa: S101 - it has been set up

        def connected() -> asyncio.Protocol:
            if len(requests.connections) >= self.connections_max:
                return _Refusing()
            return requests()

        loop = asyncio.get_running_loop()
        context = self._context()
        timeout = None if context is None else HANDSHAKE_S
        return await loop.create_server(connected, sock=bound, ssl=context, ssl_handshake_timeout=timeout)

    def _context(self) -> ssl.SSLContext | None:
        """Returns a context that has each new connection use the newest one; None without TLS."""
        if self._config is None or self._config.value.context is None:
            return None
        config = self._config

        def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            if config.value.context is not None:  # TLS is switched on and off by a restart only
                connection.context = config.value.context

        context = self._config.value.context
        context.sni_callback = choose  # called without a name too
        return context

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answers a request, if its sender may ask."""
        name, refusal = await self._authenticated(request)
        request[AUTHENTICATED] = refusal is None
        if refusal is not None and request.path not in OPEN_PATHS:
            response: web.StreamResponse = refusal
        else:
            try:
                response = await (self._paced(request, handler) if request.path == "/metrics" else handler(request))
            except web.HTTPException as error:  # 404, 405
                response = error
        self._metrics.metrics_requests_total.labels(name, str(response.status)).inc()
        return await _sent(request, response)

    async def _add_headers(self, _request: web.Request, response: web.StreamResponse) -> None:
        """Adds the headers of the web config. Of two policies for content a browser obeys both."""
        for name, value in {} if self._config is None else self._config.value.headers.items():
            if name == "Content-Security-Policy":
                response.headers.add(name, value)
            else:
                response.headers[name] = value

    async def _paced(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Has the metrics rendered when there has been a pause; a scraper that asks now and then never waits."""
        begun_s = time.monotonic()
        if begun_s < self._rested_s:
            await anyio.sleep(self._rested_s - begun_s)
            begun_s = time.monotonic()
        response = await handler(request)
        ended_s = time.monotonic()
        self._rested_s = ended_s + min(PAUSE * (ended_s - begun_s), PAUSE_S_MAX)
        return response

    async def _authenticated(self, request: web.Request) -> tuple[str, web.Response | None]:
        """Returns the name of the caller, and the response if it is not allowed to see everything."""
        users = {} if self._config is None else self._config.value.users
        if not users:
            return "anonymous", None
        name, password = _credentials(request.headers.get("Authorization", ""))
        if not name:
            return "unknown", _unauthorized()
        verdict = await self._passwords.check(name, password, users.get(name, _NO_SUCH_USER))
        if verdict is None:
            return "unknown", web.Response(
                status=429, text="too many passwords at once\n", headers={"Retry-After": "1"}
            )
        if verdict and name in users:
            return name, None
        return "unknown", _unauthorized()


class _Passwords:
    """Compares passwords, one at a time in a thread: bcrypt is slow on purpose. Remembers the latest results.

    The one that fits is remembered for each user, apart from those that do not: guesses push none of them out.
    """

    def __init__(self) -> None:
        self._one_thread = anyio.CapacityLimiter(1)
        self._fitting: dict[str, bytes] = {}
        self._wrong: OrderedDict[bytes, None] = OrderedDict()
        self._checks = 0

    async def check(self, name: str, password: bytes, digest: bytes) -> bool | None:
        """Returns whether a password fits; None if too many wait to be compared."""
        key = hashlib.sha256(b"\0".join((name.encode(), digest, password))).digest()
        if self._fitting.get(name) == key:
            return True
        if key in self._wrong:
            self._wrong.move_to_end(key)
            return False
        if self._checks >= _CHECKS_MAX:
            return None
        self._checks += 1
        try:
            fits = await anyio.to_thread.run_sync(_fits, password, digest, limiter=self._one_thread)
        finally:
            self._checks -= 1
        if fits and digest != _NO_SUCH_USER:
            self._fitting[name] = key
        else:
            self._wrong[key] = None
            if len(self._wrong) > _CACHED_MAX:
                self._wrong.popitem(last=False)
        return fits


class _Refusing(asyncio.Protocol):
    """A connection beyond the limit: closed at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Closes it."""
        transport.close()


def _fits(password: bytes, digest: bytes) -> bool:
    try:
        return bcrypt.checkpw(password, digest)
    except ValueError:  # more than the 72 bytes that bcrypt takes
        return False


def _credentials(header: str) -> tuple[str, bytes]:
    """Returns name and password of basic authentication; nothing if there are none."""
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        return "", b""
    try:
        name, separator, password = base64.b64decode(encoded, validate=True).partition(b":")
        return (name.decode(), password) if separator else ("", b"")
    except (binascii.Error, UnicodeDecodeError):
        return "", b""


def _unauthorized() -> web.Response:
    return web.Response(status=401, text="Unauthorized\n", headers={"WWW-Authenticate": 'Basic realm="tolaria"'})


async def _sent(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Sends a response; ends the connection of a client that does not take it. One that has left is no error."""
    try:
        async with asyncio.timeout(SEND_S):
            await response.prepare(request)
            await response.write_eof()
    except ConnectionError:
        pass
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
    return response


async def _shielded(call: Callable[[], Awaitable[None]]) -> None:
    with anyio.CancelScope(shield=True):
        await call()
