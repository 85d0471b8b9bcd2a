"""Makes what deployments need to begin with: a private CA, certificates of servers and clients, and token files."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tolaria.errors import CredentialsError

CA_DAYS: Final = 3650
LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
_EARLIER: Final = timedelta(minutes=5)
"""How far certificates are dated back: clocks differ."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """A CA: its certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def open(cls, folder: Path, now: datetime) -> Issuer:
        """Returns the CA of `ca.pem` and `ca.key` in a folder; makes it if neither exists.

        Raises:
            CredentialsError: one of the files is missing, or they are not a CA with its key.
        """
        cert_path, key_path = folder / "ca.pem", folder / "ca.key"
        if cert_path.exists() or key_path.exists():
            try:
                certificate = x509.load_pem_x509_certificate(cert_path.read_bytes())
                key = serialization.load_pem_private_key(key_path.read_bytes(), None)
            except (OSError, ValueError, TypeError) as error:
                detail = f"ca.pem and ca.key must be a CA with its key: {error}"
                raise CredentialsError("--dir", str(folder), detail) from None
            if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
                raise CredentialsError("--dir", str(folder), "ca.key is not the key of ca.pem")
            return cls(certificate, key)
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("Tolaria CA")
        builder = (
            _dated(now, CA_DAYS, name, name)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        issuer = cls(builder.sign(key, hashes.SHA256()), key)
        write_private(key_path, _key_pem(key))
        write_public(cert_path, issuer.certificate_pem)
        return issuer

    @property
    def certificate_pem(self) -> bytes:
        """The certificate of the CA, with which others verify."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, folder: Path, stem: str, *, hosts: Sequence[str], days: int, now: datetime) -> Path:
        """Writes `stem`.pem and `stem`.key, of a server with these hosts or, without any, of a client named `stem`.

        Raises CredentialsError for a host that cannot be in a certificate.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            _dated(now, days, _name(hosts[0] if hosts else stem), self.certificate.subject)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if hosts:
            names = [_general_name(host) for host in dict.fromkeys(hosts)]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        # The key first: a service that looks in between finds a pair that does not fit, and keeps the old one.
        write_private(folder / f"{stem}.key", _key_pem(key))
        path = folder / f"{stem}.pem"
        write_public(path, builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return path


def lasts(path: Path, hosts: Sequence[str], until: datetime) -> bool:
    """Whether a certificate exists, has all these hosts, and is valid until then."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    return certificate.not_valid_after_utc >= until and all(_general_name(host) in found for host in hosts)


def write_private(path: Path, content: bytes) -> None:
    """Writes a file that only its owner may read; all of it or nothing."""
    _write(path, content, 0o600)


def write_public(path: Path, content: bytes) -> None:
    """Writes a file that everyone may read; all of it or nothing."""
    _write(path, content, 0o644)


def _write(path: Path, content: bytes, mode: int) -> None:
    new = path.with_name(path.name + ".new")
    try:
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise CredentialsError("the file", str(path), f"cannot be written: {error.strerror or error}") from None


def _dated(now: datetime, days: int, subject: x509.Name, issuer: x509.Name) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
    builder = builder.serial_number(x509.random_serial_number())
    begin = now.astimezone(UTC) - _EARLIER
    return builder.not_valid_before(begin).not_valid_after(begin + timedelta(days=days))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise CredentialsError("--host", host, "is neither a host name nor an IP address") from None


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
