"""The addresses that a service listens on: bound before the job's code runs, and kept bound until it serves them."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from tolaria import forks
from tolaria.config import Address, Settings
from tolaria.errors import BindError
from tolaria.grpc_server import BoundServer, bound_server
from tolaria.service.protection import Protection, protected
from tolaria.telemetry.metrics import Metrics

_ADMIN, _METRICS = "server.listen: the admin server", "metrics.listen: the metrics server"


@dataclass(frozen=True, slots=True)
class Listeners:
    """What the admin server and the metrics server accept connections on. Those made before they serve wait."""

    admin: BoundServer
    protection: Protection
    metrics: tuple[socket.socket, ...]
    metrics_address: Address


def open_listeners(settings: Settings, loop: asyncio.Runner, metrics: Metrics) -> Listeners:
    """Binds both addresses; `loop` is the one that serves later. Forks of this process do not inherit them.

    Raises:
        CredentialsError: a file with certificates, tokens or passwords cannot be used.
        BindError: which names the setting, the cause and, if it can be found, the process that has the address.
    """
    listen, protection = settings.server.listen, protected(settings, metrics)
    server = bound_server(
        *(_ADMIN, listen),
        tls=protection.tls,
        interceptors=[protection.interceptor],
        request_bytes_max=1024 * settings.server.request_kb_max,
        connection_idle_s=settings.server.idle_s,
    )
    try:
        admin = loop.run(server)
    except BindError:
        for bound in open_sockets(_ADMIN, listen):  # raises with the cause, which gRPC does not report
            bound.close()
        raise
    listeners = with_metrics(admin, settings.metrics.listen, protection)
    for address in (admin.address, listeners.metrics_address):
        forks.keep_sockets_private(address.port)
    return listeners


def with_metrics(admin: BoundServer, listen: str, protection: Protection) -> Listeners:
    """Returns the admin server and the sockets of the metrics server. Raises as `open_sockets` does."""
    sockets = open_sockets(_METRICS, listen)
    return Listeners(admin, protection, sockets, Address(Address.parse(listen).host, sockets[0].getsockname()[1]))


def open_sockets(what: str, listen: str) -> tuple[socket.socket, ...]:
    """Listens on every address of the host, on one port. Raises BindError, which begins with `what`."""
    wanted, sockets = Address.parse(listen), list[socket.socket]()
    port = wanted.port
    with ExitStack() as undo:
        try:
            found = socket.getaddrinfo(wanted.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, host in dict.fromkeys((info[0], str(info[4][0])) for info in found):
                sockets.append(undo.enter_context(socket.create_server((host, port), family=family)))
                port = sockets[0].getsockname()[1]
        except OSError as error:
            cause = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
            raise BindError(what, listen, f"{cause or error}{_holder(port)}") from None
        undo.pop_all()
    return tuple(sockets)


def _holder(port: int) -> str:
    """Returns " (process 12)", where that process listens on the port and this one may look at it; else nothing."""
    inodes = forks.listening_inodes(port)
    for entry in Path("/proc").glob("[0-9]*/fd/*") if inodes else ():
        with suppress(OSError):
            if entry.readlink().name in inodes:
                return f" (process {entry.parts[2]})"
    return ""
