"""Whether a service could use the files that its settings name for TLS, tokens, passwords and groups."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tolaria.config import PeerSettings, Settings
from tolaria.config.ranks import read_secret
from tolaria.errors import ConfigurationError, CredentialsError
from tolaria.peers.connect import Peer, tls_files
from tolaria.security import web_config
from tolaria.security.certificates import TlsFiles
from tolaria.security.tokens import Tokens
from tolaria.security.web_config import WebConfig

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class CredentialFinding:
    """What is wrong with a file; `fatal`: a service would not start with it. `advice` may be empty."""

    setting: str
    detail: str
    fatal: bool
    advice: str = ""


def credential_findings(settings: Settings, now: datetime) -> Iterator[CredentialFinding]:
    """Yields what is wrong with the files, in the order of the settings; nothing if all is well."""
    server = settings.server
    yield from _tls(TlsFiles("server", server.tls_cert, server.tls_key, server.tls_client_ca), now)
    if server.tokens:
        yield from _checked("server.tokens", server.tokens, lambda: _tokens(server.tokens, now))
    if path := settings.metrics.web_config:
        yield from _checked(web_config.SETTING, path, lambda: _web(path, now))
    peers: Sequence[tuple[Peer, PeerSettings]] = (("tamiyo", settings.tamiyo), ("kasmina", settings.kasmina))
    for peer, section in peers:
        yield from _tls(tls_files(peer, section), now)
    if file := settings.lane.secret_file:
        yield from _checked("lane.secret_file", file, lambda: _secret(file))


def names_credentials(settings: Settings) -> bool:
    """Whether the settings name any such file."""
    sections = (settings.server, settings.tamiyo, settings.kasmina)
    tls = any(section.tls_cert for section in sections) or settings.tamiyo.tls_ca or settings.kasmina.tls_ca
    return bool(tls or settings.server.tokens or settings.metrics.web_config or settings.lane.secret_file)


def _checked(
    setting: str, path: str, check: Callable[[], Iterator[CredentialFinding]], *, secret: bool = False
) -> Iterator[CredentialFinding]:
    """Yields what `check` finds, or the error that it raises, and what is wrong with the file's permissions."""
    try:
        yield from check()
    except CredentialsError as error:
        yield CredentialFinding(error.setting, f"{error.path}: {error.detail}", fatal=True)
    except ConfigurationError as error:
        yield CredentialFinding(setting, "; ".join(error.problems), fatal=True)
    yield from _permissions(setting, path, secret=secret or setting == "lane.secret_file")


def _tls(files: TlsFiles, now: datetime) -> Iterator[CredentialFinding]:
    if not files.cert and not files.authorities:
        return
    setting = f"{files.section}.tls_cert"

    def check() -> Iterator[CredentialFinding]:
        files.read()
        yield from _expiry(files, now)

    if files.cert:
        yield from _checked(setting, files.cert, check)
        yield from _permissions(f"{files.section}.tls_key", files.key, secret=True)
    else:
        yield from _checked(f"{files.section}.{files.authorities_setting}", files.authorities, check)


def _tokens(path: str, now: datetime) -> Iterator[CredentialFinding]:
    entries = Tokens.read(path)[0].entries
    expired = [entry for entry in entries if entry.expires is not None and entry.expires <= now]
    left = "no token is left: every call would be refused" if len(expired) == len(entries) else ""
    for entry in expired:
        detail = f"{path}: the token {entry.name} expired on {entry.expires:%Y-%m-%d %H:%M} UTC"
        yield CredentialFinding("server.tokens", detail, fatal=False, advice=f"tolaria token revoke {entry.name}")
    if left:
        yield CredentialFinding("server.tokens", f"{path}: {left}", fatal=False, advice="tolaria token new")


def _web(path: str, now: datetime) -> Iterator[CredentialFinding]:
    config = WebConfig.read(path)[0]
    if config.tls is not None:
        yield from _expiry(config.tls, now)
        yield from _permissions(web_config.SETTING, config.tls.key, secret=True)


def _secret(path: str) -> Iterator[CredentialFinding]:
    read_secret(path)
    yield from ()


def _expiry(files: TlsFiles, now: datetime) -> Iterator[CredentialFinding]:
    if warning := files.expiry_warning(now):
        setting, _, detail = warning.partition(": ")
        yield CredentialFinding(setting, detail, fatal=False, advice="renew it: `tolaria certs init` makes a new one")


def _permissions(setting: str, path: str, *, secret: bool) -> Iterator[CredentialFinding]:
    """Yields that others may write a file, or read one that is secret; nothing about a file that is not there."""
    try:
        mode = stat.S_IMODE(Path(path).stat().st_mode)
    except OSError:
        return
    if mode & 0o022:
        yield CredentialFinding(
            setting, f"{path} can be written by others (mode {mode:o})", False, f"chmod go-w {path}"
        )
    if secret and mode & 0o004:
        yield CredentialFinding(setting, f"{path} can be read by all users (mode {mode:o})", False, f"chmod o-r {path}")
