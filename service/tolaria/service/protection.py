"""What protects the servers of a service: certificates, tokens, passwords and limits, kept current while it runs."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio

from tolaria.config import PeerSettings, ServerSettings, Settings
from tolaria.peers.connect import Peer, tls_files
from tolaria.rpc.callers import CallerInterceptor
from tolaria.security import web_config
from tolaria.security.certificates import Identity, TlsFiles, Validity
from tolaria.security.limits import CallerLimits, CallLimits
from tolaria.security.tokens import Tokens
from tolaria.security.watched import WatchedFiles, watch
from tolaria.security.web_config import WebConfig
from tolaria.service.expiry import CertificateExpiry, UsedCertificate
from tolaria.telemetry.metrics import Metrics
from tolaria.telemetry.web_server import WebGuard


@dataclass(frozen=True, slots=True)
class Protection:
    """The files that protect the servers, and the interceptor of the admin server."""

    tls: WatchedFiles[Identity] | None
    tokens: WatchedFiles[Tokens] | None
    interceptor: CallerInterceptor
    expiry: CertificateExpiry
    web: WatchedFiles[WebConfig] | None
    guard: WebGuard
    limits: CallerLimits

    def adopt(self, settings: Settings) -> None:
        """Holds callers and scrapers to the limits of these settings from now on."""
        self.limits.adopt(_call_limits(settings.server))
        self.guard.connections_max = settings.metrics.connections_max

    async def keep_current(self) -> None:
        """Reads changed files again, and warns of certificates that expire, until cancelled."""
        watched = [files for files in (self.tls, self.tokens, self.web) if files is not None]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, *watched)
            tasks.start_soon(self.expiry.keep_current)


def protected(settings: Settings, metrics: Metrics) -> Protection:
    """Reads the files that the settings name. Raises CredentialsError."""
    server = settings.server
    files = TlsFiles("server", server.tls_cert, server.tls_key, server.tls_client_ca)

    def failed() -> None:
        metrics.server_credentials_failures_total.inc()

    tls = WatchedFiles("server.tls_cert", files.read, on_failure=failed) if server.tls_cert else None
    tokens = None
    if server.tokens:
        tokens = WatchedFiles("server.tokens", lambda: Tokens.read(server.tokens), on_failure=failed)
    limits = CallerLimits(_call_limits(server))
    peers: tuple[tuple[Peer, PeerSettings], ...] = (("tamiyo", settings.tamiyo), ("kasmina", settings.kasmina))
    peer_certificates = dict[str, UsedCertificate]()
    for peer, section in peers:
        identity = tls_files(peer, section)
        identity.read()  # a mistake is found now rather than after the job has been built
        if identity.cert:  # the one that is read now is used until the end
            peer_certificates[f"{peer}.tls_cert"] = UsedCertificate(identity.cert, identity.validity())
    interceptor = CallerInterceptor(tokens, limits, metrics)
    path = settings.metrics.web_config
    web = WatchedFiles(web_config.SETTING, lambda: WebConfig.read(path), on_failure=failed) if path else None
    guard = WebGuard(web, metrics, settings.metrics.connections_max)
    named: tuple[tuple[str, WatchedFiles[Any] | None], ...] = (
        ("server.tls_cert", tls),
        ("server.tokens", tokens),
        (web_config.SETTING, web),
    )
    for setting, watched in named:
        if watched is not None:
            metrics.server_credentials_current.labels(setting).set_function(partial(_is_current, watched))

    cert = server.tls_cert

    def certificates() -> dict[str, UsedCertificate]:
        found = dict(peer_certificates)
        if tls is not None:
            found["server.tls_cert"] = UsedCertificate(cert, Validity.of(tls.value.chain, "server.tls_cert", cert))
        if web is not None and web.value.tls is not None and web.value.validity is not None:
            found[web_config.SETTING] = UsedCertificate(web.value.tls.cert, web.value.validity)
        return found

    return Protection(tls, tokens, interceptor, CertificateExpiry(certificates, metrics), web, guard, limits)


def _is_current(watched: WatchedFiles[Any]) -> bool:
    return not watched.problem


def _call_limits(server: ServerSettings) -> CallLimits:
    return CallLimits(
        calls_per_second=server.calls_per_second,
        bad_calls_per_second=server.bad_calls_per_second,
        calls_in_flight_max=server.calls_in_flight_max,
        streams_max=server.streams_max,
    )


def forbid_core_files(settings: Settings) -> None:
    """Keeps the system from writing core files of this process and its children, unless the settings allow them.

    Both kinds: Linux pipes a core to a program, if it is configured so, whatever the limit is, except for 1 byte.
    """
    if settings.service.core_files:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))
