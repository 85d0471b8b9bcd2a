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

    def validity(self) -> Validity:
        """Reads when the certificate is valid. Raises CredentialsError."""
        setting = f"{self.section}.tls_cert"
        return Validity.of(read_file(self.cert, setting), setting, self.cert)

    def expiry_warning(self, now: datetime) -> str:
        """Returns a sentence about a certificate that has expired or soon will; else nothing. Reads the file."""
        return self.validity().warning(f"{self.section}.tls_cert", self.cert, now) if self.cert else ""

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


@dataclass(frozen=True, slots=True)
class Validity:
    """When a certificate is valid; both times are in UTC."""

    begins: datetime
    ends: datetime

    @classmethod
    def of(cls, chain: bytes, setting: str, path: str) -> Validity:
        """Returns that of the first certificate of a chain in PEM. Raises CredentialsError if there is none."""
        from cryptography import x509  # noqa: PLC0415 - 70 ms, for those who use TLS only

        try:
            leaf = x509.load_pem_x509_certificate(chain)
        except ValueError:
            raise CredentialsError(setting, path, "it holds no certificate in PEM") from None
        return cls(leaf.not_valid_before_utc, leaf.not_valid_after_utc)

    @property
    def renewal_due(self) -> datetime:
        """Since when it should have been renewed: two weeks before its end, later if it does not last ten weeks.

        Those that are renewed by themselves, every day or hour, are renewed before the last fifth of their time.
        """
        return self.ends - min(EXPIRES_SOON, (self.ends - self.begins) / 5)

    def warning(self, setting: str, path: str, now: datetime) -> str:
        """Returns a sentence if it is not valid at this time, or is due for renewal; else nothing."""
        if now < self.begins:
            return f"{setting}: {path} is valid from {self.begins:%Y-%m-%d %H:%M} UTC on only"
        if now >= self.ends:
            return f"{setting}: {path} expired on {self.ends:%Y-%m-%d %H:%M} UTC; the other side refuses it"
        return f"{setting}: {path} expires on {self.ends:%Y-%m-%d %H:%M} UTC" if now >= self.renewal_due else ""


def now_utc() -> datetime:
    """Returns the time, to compare with those in certificates and tokens."""
    return datetime.now(UTC)
