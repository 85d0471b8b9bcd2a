"""The web config file of Prometheus's exporters: TLS, basic authentication and headers of the metrics server.

The format is that of the exporter toolkit. What this server cannot do is refused by name rather than ignored. Paths are
relative to the folder of the file. An example:

    tls_server_config:
      cert_file: server.pem
      key_file: server.key
      client_auth_type: RequireAndVerifyClientCert
      client_ca_file: ca.pem
    basic_auth_users:
      prometheus: $2y$10$...        # bcrypt, as `htpasswd -nB prometheus` prints it
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import yaml

from tolaria.errors import CredentialsError
from tolaria.security.certificates import TlsFiles, Validity
from tolaria.security.watched import read_file

SETTING: Final = "metrics.web_config"
_VERSIONS: Final = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_CLIENTS: Final = {
    "": ssl.CERT_NONE,
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
_HEADERS: Final = {
    "Content-Security-Policy", "Strict-Transport-Security", "X-Content-Type-Options", "X-Frame-Options",
    "X-XSS-Protection",
}  # fmt: skip
_BCRYPT = re.compile(r"\$2[abxy]\$\d\d\$[./A-Za-z0-9]{53}", re.ASCII)
_KNOWN: Final[Mapping[str, frozenset[str]]] = {
    "": frozenset({"tls_server_config", "http_server_config", "basic_auth_users"}),
    "tls_server_config": frozenset(
        {"cert_file", "key_file", "client_auth_type", "client_ca_file", "min_version", "max_version"}
    ),
    "http_server_config": frozenset({"headers", "http2"}),
}


@dataclass(frozen=True, slots=True)
class WebConfig:
    """What the file says. `users` are bcrypt digests by name; `context` is ready for connections, if TLS is on.

    `validity` is that of the certificate which it has.
    """

    tls: TlsFiles | None = None
    clients: ssl.VerifyMode = ssl.CERT_NONE
    versions: tuple[ssl.TLSVersion, ssl.TLSVersion] = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
    users: Mapping[str, bytes] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    context: ssl.SSLContext | None = None
    validity: Validity | None = None

    @classmethod
    def read(cls, path: str) -> tuple[WebConfig, Sequence[str]]:
        """Reads a file; returns it and the files that it names too, for `WatchedFiles`. Raises CredentialsError."""
        try:
            content = yaml.safe_load(read_file(path, SETTING)) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = getattr(error, "problem_mark", None)  # the message would quote the file, which holds digests
            raise CredentialsError(SETTING, path, f"is no YAML{f', line {where.line + 1}' if where else ''}") from None
        reader = _Reader(path)
        reader.check("", content)
        tls = content.get("tls_server_config") or {}
        http = content.get("http_server_config") or {}
        reader.check("tls_server_config", tls)
        reader.check("http_server_config", http)
        found = cls(
            tls=reader.tls_files(tls) if tls else None,
            clients=reader.choice(tls, "client_auth_type", _CLIENTS, ""),
            versions=(
                reader.choice(tls, "min_version", _VERSIONS, "TLS12"),
                reader.choice(tls, "max_version", _VERSIONS, "TLS13"),
            ),
            users=reader.users(content.get("basic_auth_users") or {}),
            headers=reader.headers(http.get("headers") or {}),
        )
        if (found.clients != ssl.CERT_NONE) != bool(found.tls and found.tls.authorities):
            raise reader.refused("tls_server_config", "client_auth_type and client_ca_file must be set together")
        files = [] if found.tls is None else list(found.tls.read()[1])
        validity = None if found.tls is None else found.tls.validity()
        return replace(found, context=_context(found), validity=validity), [path, *files]


def _context(config: WebConfig) -> ssl.SSLContext | None:
    """Returns the context of a server; None without TLS. Raises CredentialsError."""
    if config.tls is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version, context.maximum_version = config.versions
    context.verify_mode = config.clients
    try:
        context.load_cert_chain(config.tls.cert, config.tls.key)
        if config.tls.authorities:
            context.load_verify_locations(config.tls.authorities)
    except (ssl.SSLError, OSError) as error:
        raise CredentialsError(SETTING, config.tls.cert, f"cannot be used: {error}") from None
    return context


class _Reader:
    """Checks and converts the parts of a file. Every method raises CredentialsError."""

    def __init__(self, path: str) -> None:
        self._path = path

    def refused(self, name: str, detail: str) -> CredentialsError:
        return CredentialsError(SETTING, self._path, f"{name}: {detail}" if name else detail)

    def check(self, name: str, table: Any) -> None:
        if not isinstance(table, dict):
            raise self.refused(name, "must be a mapping")
        if unknown := sorted(map(str, table.keys() - _KNOWN[name])):
            raise self.refused(
                name, f"not supported: {', '.join(unknown)}; known are {', '.join(sorted(_KNOWN[name]))}"
            )

    def tls_files(self, table: Mapping[str, Any]) -> TlsFiles:
        cert, key, authorities = (self._file(table, name) for name in ("cert_file", "key_file", "client_ca_file"))
        if not cert or not key:
            raise self.refused("tls_server_config", "cert_file and key_file must be set")
        return TlsFiles(f"{SETTING}: tls_server_config", cert, key, authorities, authorities_setting="client_ca_file")

    def choice(self, table: Mapping[str, Any], name: str, known: Mapping[str, Any], default: str) -> Any:
        value = table.get(name, default)
        if not isinstance(value, str) or value not in known:
            names = ", ".join(filter(None, known))
            raise self.refused(f"tls_server_config.{name}", f"must be one of {names}")
        return known[value]

    def users(self, table: Any) -> dict[str, bytes]:
        if not isinstance(table, dict):
            raise self.refused("basic_auth_users", "must be a mapping")
        for name, digest in table.items():
            if not isinstance(name, str) or not name or ":" in name or not isinstance(digest, str):
                raise self.refused("basic_auth_users", "maps names without a colon to texts")
            if not _BCRYPT.fullmatch(digest):
                raise self.refused(f"basic_auth_users.{name}", "is no bcrypt digest; `htpasswd -nB NAME` makes one")
        return {name: digest.encode() for name, digest in table.items()}

    def headers(self, table: Any) -> dict[str, str]:
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise self.refused("http_server_config.headers", "must map names to texts")
        if unknown := sorted(map(str, table.keys() - _HEADERS)):
            raise self.refused("http_server_config.headers", f"not allowed by the format: {', '.join(unknown)}")
        return dict(table)

    def _file(self, table: Mapping[str, Any], name: str) -> str:
        value = table.get(name) or ""
        if not isinstance(value, str):
            raise self.refused(f"tls_server_config.{name}", "must be a path")
        return str(Path(self._path).parent / value) if value else ""
