"""Certificates, tokens and a protected admin server for tests; the secrets are made up for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import grpc
import grpc.aio
from anyio import to_thread

from tolaria.config import ServerSettings
from tolaria.grpc_server import GrpcServer, bound_server, grpc_server
from tolaria.rpc.callers import CallerInterceptor
from tolaria.security.certificates import Identity, TlsFiles, now_utc
from tolaria.security.issuing import Issuer
from tolaria.security.limits import CallerLimits, CallLimits
from tolaria.security.tokens import Role, Tokens, as_table
from tolaria.security.watched import WatchedFiles
from tolaria.telemetry.metrics import Metrics

TOKENS = {"vic": Role.VIEWER, "olga": Role.OPERATOR, "root": Role.ADMIN}
"""Names of the tokens, which are also their texts, and their roles."""


@dataclass
class Pki:
    """A folder with a CA and what it has signed."""

    folder: Path
    issuer: Issuer = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.issuer = Issuer.open(self.folder, now_utc())

    @property
    def ca(self) -> Path:
        """The certificate of the CA."""
        return self.folder / "ca.pem"

    def server(self, *hosts: str, stem: str = "server") -> Path:
        """Makes a certificate for a server; the key beside it ends in `.key`."""
        names = hosts or ("localhost", "127.0.0.1")
        return self.issuer.issue(self.folder, stem, hosts=names, days=30, now=now_utc())

    def client(self, name: str, *, expired: bool = False) -> Path:
        """Makes a certificate for a client."""
        now = now_utc() - timedelta(days=60) if expired else now_utc()
        return self.issuer.issue(self.folder, name, hosts=(), days=30, now=now)

    def watched(self, *, clients: bool = False) -> WatchedFiles[Identity]:
        """The identity of a server, with the CA of its clients."""
        path = self.server()
        authorities = str(self.ca) if clients else ""
        return WatchedFiles("server", TlsFiles("server", str(path), key_of(path), authorities).read)


def key_of(certificate: Path) -> str:
    """The path of a certificate's key."""
    return str(certificate.with_suffix(".key"))


def write_tokens(path: Path, roles: Mapping[str, Role], *, expired: str = "") -> Path:
    """Writes a file of tokens whose texts are their names."""
    past = datetime(2020, 1, 1, tzinfo=UTC)
    tables = [as_table(name, role, name, past if name == expired else None) for name, role in roles.items()]
    path.write_text("\n".join(tables))
    return path


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata with a token."""
    return (("authorization", f"Bearer {token}"),)


@dataclass
class Protected:
    """A protected server: its metrics and its interceptor."""

    server: GrpcServer
    metrics: Metrics
    interceptor: CallerInterceptor
    tokens: WatchedFiles[Tokens] | None

    async def counts(self, caller: str, code: str, calls: int) -> None:
        """Waits until that many calls are counted for a caller and a status, which may be after their answers."""
        labels = {"caller": caller, "code": code}
        with anyio.fail_after(180):
            while (self.metrics.registry.get_sample_value("tolaria.server.calls_total", labels) or 0.0) != calls:
                await anyio.sleep(0.005)


@asynccontextmanager
async def protected_server(
    register: Any,
    *,
    tokens: Path | None = None,
    tls: WatchedFiles[Identity] | None = None,
    request_bytes_max: int = 65536,
    **limits: float,
) -> AsyncIterator[Protected]:
    """Serves on loopback behind the interceptor; `limits` replace those of the settings."""
    defaults = ServerSettings()
    values = {name: limits.get(name, getattr(defaults, name)) for name in CallLimits.__dataclass_fields__}
    watched = None
    if tokens is not None:
        watched = await to_thread.run_sync(lambda: WatchedFiles("tokens", lambda: Tokens.read(str(tokens))))
    metrics = Metrics()
    interceptor = CallerInterceptor(watched, CallerLimits(CallLimits(**values)), metrics)
    bound = await bound_server(
        "test", "127.0.0.1:0", tls=tls, interceptors=[interceptor], request_bytes_max=request_bytes_max
    )
    names = ["leyline.v1.TolariaAdminService"]
    async with grpc_server(bound, register, service_names=names, grace_s=1.0) as server:
        yield Protected(server, metrics, interceptor, watched)


def credentials_of(ca: Path, certificate: Path | None = None) -> grpc.ChannelCredentials:
    """The credentials of a client, with its certificate if it has one. Reads the files."""
    chain = None if certificate is None else certificate.read_bytes()
    key = None if certificate is None else Path(key_of(certificate)).read_bytes()
    return grpc.ssl_channel_credentials(ca.read_bytes(), key, chain)


def channel_to(
    server: Protected, credentials: grpc.ChannelCredentials | None = None, *, name: str = ""
) -> grpc.aio.Channel:
    """Opens a channel of a connection that it shares with no other, with TLS if there are credentials."""
    options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
    if name:
        options.append(("grpc.ssl_target_name_override", name))
    if credentials is None:
        return grpc.aio.insecure_channel(str(server.server.address), options=options)
    return grpc.aio.secure_channel(str(server.server.address), credentials, options=options)
