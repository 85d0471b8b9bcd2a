from __future__ import annotations

import shutil
import ssl
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from support.security import Pki, key_of
from tolaria.errors import CredentialsError
from tolaria.security.certificates import Identity, TlsFiles, Validity, now_utc
from tolaria.security.issuing import Issuer, lasts


def files(certificate: Path, authorities: str = "") -> TlsFiles:
    """The files of a server."""
    return TlsFiles("server", str(certificate), key_of(certificate), authorities)


def test_a_pair_is_read_with_its_authorities(tmp_path: Path) -> None:
    """As bytes, and the files are listed for watching; the key is in no representation."""
    pki = Pki(tmp_path)
    certificate = pki.server()
    identity, watched = files(certificate, str(pki.ca)).read()
    assert identity == Identity(certificate.read_bytes(), Path(key_of(certificate)).read_bytes(), pki.ca.read_bytes())
    assert list(watched) == [str(certificate), key_of(certificate), str(pki.ca)]
    assert "PRIVATE" not in repr(identity)


def test_wrong_files_are_refused_by_name(tmp_path: Path) -> None:
    """A foreign key, no key, no certificate, a key with a password, a missing file, authorities that are none."""
    pki = Pki(tmp_path)
    first, second = pki.server(stem="first"), pki.server(stem="second")
    text = tmp_path / "text"
    text.write_text("no PEM\n")
    locked = tmp_path / "locked.key"
    private = serialization.load_pem_private_key(Path(key_of(first)).read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"password")
    locked.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    cases = {
        TlsFiles("server", str(first), key_of(second)): "server.tls_key: .*: it is not the key of the certificate in",
        TlsFiles("server", str(first), str(text)): "is not a private key in PEM",
        TlsFiles("server", str(text), key_of(first)): "server.tls_cert: .*: not a certificate in PEM",
        TlsFiles("server", str(first), str(locked)): "server.tls_key: .*: the key has a password",
        TlsFiles("server", str(tmp_path / "none"), key_of(first)): "server.tls_cert: .*: No such file",
        files(first, str(text)): "server.tls_client_ca: .*: it holds no certificates in PEM",
        files(first, str(tmp_path / "none")): "server.tls_client_ca: .*: No such file",
    }
    for case, words in cases.items():
        with pytest.raises(CredentialsError, match=words):
            case.read()


def test_expiry_is_announced(tmp_path: Path) -> None:
    """In the last fifth of its time, and afterwards; and a certificate that is not valid yet."""
    certificate, now = Pki(tmp_path).server(), now_utc()

    def warning(days: int) -> str:
        validity = Validity.of(certificate.read_bytes(), "server.tls_cert", "f")
        return validity.warning("server.tls_cert", "f", now + timedelta(days=days))

    assert warning(0) == ""
    assert warning(23) == ""
    assert warning(25).startswith("server.tls_cert: f expires on ")
    assert warning(31).startswith("server.tls_cert: f expired on ")
    assert "from " in warning(-1)
    assert files(certificate).expiry_warning(now) == ""


@pytest.mark.parametrize(("lasts", "before"), [(365, 14.0), (90, 14.0), (30, 6.0), (1, 0.2), (1 / 24, 0.2 / 24)])
def test_renewal_is_due_before_the_end_but_not_before_others_renew(lasts: float, before: float) -> None:
    """Those that last a day or an hour are renewed by themselves, at two thirds of it: no warning while they are."""
    begins = now_utc()
    validity = Validity(begins, begins + timedelta(days=lasts))
    assert abs((validity.ends - validity.renewal_due) / timedelta(days=1) - before) < 1e-6
    assert validity.renewal_due > begins + timedelta(days=lasts) * 2 / 3


def test_what_is_issued_verifies_for_its_hosts_only(tmp_path: Path) -> None:
    """By OpenSSL: the server for its names and addresses, the client as a client; neither by a foreign CA."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl (Debian package openssl) is not installed")
    pki, foreign = Pki(tmp_path / "a"), Pki(tmp_path / "b")
    server, client = pki.server("gpu1", "192.0.2.7"), pki.client("alice")

    def verify(certificate: Path, *options: str, ca: Path = pki.ca) -> bool:
        command = ["openssl", "verify", "-x509_strict", "-CAfile", str(ca), *options, str(certificate)]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    assert verify(server, "-purpose", "sslserver", "-verify_hostname", "gpu1")
    assert verify(server, "-verify_ip", "192.0.2.7")
    assert not verify(server, "-verify_hostname", "gpu2")
    assert verify(client, "-purpose", "sslclient")
    assert not verify(client, "-purpose", "sslserver")
    assert not verify(server, "-purpose", "sslclient")
    assert not verify(server, ca=foreign.ca)


def test_keys_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    """Also if the umask would allow more; certificates are public."""
    pki = Pki(tmp_path)
    certificate = pki.server()
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600
    assert Path(key_of(certificate)).stat().st_mode & 0o777 == 0o600
    assert certificate.stat().st_mode & 0o777 == 0o644


def test_an_existing_ca_is_used_again(tmp_path: Path) -> None:
    """One without its key, or with another's, is refused instead of being replaced."""
    first = Issuer.open(tmp_path, now_utc())
    assert Issuer.open(tmp_path, now_utc()).certificate == first.certificate
    other = Pki(tmp_path / "other")
    (tmp_path / "ca.key").write_bytes((other.folder / "ca.key").read_bytes())
    with pytest.raises(CredentialsError, match=r"ca\.key is not the key of ca\.pem"):
        Issuer.open(tmp_path, now_utc())
    (tmp_path / "ca.key").unlink()
    with pytest.raises(CredentialsError, match="must be a CA with its key"):
        Issuer.open(tmp_path, now_utc())
    assert x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes()) == first.certificate


def test_a_host_that_cannot_be_in_a_certificate_is_refused(tmp_path: Path) -> None:
    """The message names it."""
    with pytest.raises(CredentialsError, match="höst"):
        Pki(tmp_path).server("höst")


def test_whether_a_certificate_lasts(tmp_path: Path) -> None:
    """It has to have all hosts, until then; another file does not."""
    certificate, soon = Pki(tmp_path).server("a", "127.0.0.1"), now_utc() + timedelta(days=29)
    assert lasts(certificate, ["a", "127.0.0.1"], soon)
    assert not lasts(certificate, ["a", "b"], soon)
    assert not lasts(certificate, ["a"], soon + timedelta(days=1))
    assert not lasts(tmp_path / "ca.pem", ["a"], soon)
    assert not lasts(tmp_path / "none", ["a"], soon)


def test_a_context_of_python_takes_the_pair(tmp_path: Path) -> None:
    """The metrics server uses it in this way."""
    certificate = Pki(tmp_path).server()
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key_of(certificate))
