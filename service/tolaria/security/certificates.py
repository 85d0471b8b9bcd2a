"""Certificates and private keys of servers and clients: read, checked, and described for the log."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from tolaria.errors import CredentialsError
from tolaria.security.watched import read_file

EXPIRES_SOON: Final = timedelta(days=14)


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate chain with its private key, and the CAs of the other side; all in PEM. Empty where not used."""

    chain: bytes = b""
    key: bytes = b""
    authorities: bytes = b""

    def __repr__(self) -> str:
        return "Identity(...)"  # never the key


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The files of an identity; `section` begins the names of the settings that errors mention."""

    section: str
    cert: str = ""
    key: str = ""
    authorities: str = ""
    authorities_setting: str = "tls_client_ca"

    def read(self) -> tuple[Identity, Sequence[str]]:
        """Reads and checks the files; returns them too, for `WatchedFiles`.

        Raises:
            CredentialsError: a file cannot be read, is not PEM, or the key is not that of the certificate.
        """
        chain = key = authorities = b""
        if self.cert:
            self._require_pair()
            chain = read_file(self.cert, f"{self.section}.tls_cert")
            key = read_file(self.key, f"{self.section}.tls_key")
        if self.authorities:
            setting = f"{self.section}.{self.authorities_setting}"
            authorities = read_file(self.authorities, setting)
            require_authorities(authorities, setting, self.authorities)
        return Identity(chain, key, authorities), [path for path in (self.cert, self.key, self.authorities) if path]

    def expiry_warning(self, now: datetime) -> str:
        """Returns a sentence about a certificate that has expired or soon will; else nothing. Reads the file."""
        setting = f"{self.section}.tls_cert"
        return expiry_warning(read_file(self.cert, setting), setting, self.cert, now) if self.cert else ""

    def _require_pair(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                detail = f"it is not the key of the certificate in {self.cert}"
                raise CredentialsError(f"{self.section}.tls_key", self.key, detail) from None
            detail = f"not a certificate in PEM, or {self.key} is not a private key in PEM"
            raise CredentialsError(f"{self.section}.tls_cert", self.cert, detail) from None
        except OSError as error:
            detail = f"{error.strerror or error} ({self.key})"
            raise CredentialsError(f"{self.section}.tls_cert", self.cert, detail) from None
        except _PasswordNeededError:
            raise CredentialsError(
                f"{self.section}.tls_key", self.key, "the key has a password; store it without one"
            ) from None


class _PasswordNeededError(Exception):
    """Raised instead of asking on the terminal."""


def _no_password() -> str:
    raise _PasswordNeededError


def require_authorities(content: bytes, setting: str, path: str) -> None:
    """Raises CredentialsError unless the content is certificates in PEM."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise CredentialsError(setting, path, "it holds no certificates in PEM") from None


def expiry_warning(chain: bytes, setting: str, path: str, now: datetime) -> str:
    """Returns a sentence if the first certificate of a chain is not valid now or expires soon; else nothing."""
    from cryptography import x509  # noqa: PLC0415 - 70 ms, for those who use TLS only

    try:
        leaf = x509.load_pem_x509_certificate(chain)
    except ValueError:
        raise CredentialsError(setting, path, "it holds no certificate in PEM") from None
    if now < leaf.not_valid_before_utc:
        return f"{setting}: {path} is valid from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on only"
    if now >= leaf.not_valid_after_utc:
        return f"{setting}: {path} expired on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; clients refuse it"
    if now >= leaf.not_valid_after_utc - EXPIRES_SOON:
        return f"{setting}: {path} expires on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    return ""


def now_utc() -> datetime:
    """Returns the time, to compare with those in certificates and tokens."""
    return datetime.now(UTC)
