from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from support.security import Pki
from tolaria.config import Settings, load_settings
from tolaria.errors import CredentialsError
from tolaria.security.certificates import now_utc
from tolaria.security.tokens import Role, as_table
from tolaria.service.credentials import credential_findings, names_credentials
from tolaria.service.protection import protected
from tolaria.telemetry.metrics import Metrics


class Files:
    """The files of a protected service, all sound."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pki = Pki(folder)
        self.cert = self.pki.server()
        self.key = self.cert.with_suffix(".key")
        self.tokens = self.write("tokens.toml", as_table("olga", Role.OPERATOR, "text", None))
        self.web = self.write("web.yml", "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n")
        self.secret = self.write("group.secret", "0123456789abcdef0123456789abcdef")

    def write(self, name: str, text: str) -> Path:
        """Writes a file that only its owner can read."""
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o600)
        return path

    def settings(self) -> Settings:
        """Returns the settings that name them all."""
        return load_settings(
            None,
            [
                *(f"server.tls_cert={self.cert}", f"server.tls_key={self.key}", f"server.tokens={self.tokens}"),
                *(f"server.tls_client_ca={self.pki.ca}", f"metrics.web_config={self.web}"),
                *("tamiyo.target=peer:50052", f"tamiyo.tls_ca={self.pki.ca}", f"lane.secret_file={self.secret}"),
            ],
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """New files."""
    return Files(tmp_path)


def found(files: Files, after: timedelta = timedelta()) -> list[tuple[str, bool]]:
    """Returns the setting of each finding, and whether it is fatal."""
    return [(one.setting, one.fatal) for one in credential_findings(files.settings(), now_utc() + after)]


def test_sound_files_have_no_finding(files: Files) -> None:
    """Nor have settings that name none."""
    assert found(files) == []
    assert names_credentials(files.settings())
    assert list(credential_findings(Settings(), now_utc())) == []
    assert not names_credentials(Settings())


@pytest.mark.parametrize(
    ("name", "content", "setting"),
    [
        ("server.pem", "no pem", "server.tls_cert"),
        ("server.pem", None, "server.tls_cert"),
        ("server.key", None, "server.tls_cert"),
        ("ca.pem", "no pem", "server.tls_client_ca"),
        ("tokens.toml", "token = 3", "server.tokens"),
        ("tokens.toml", None, "server.tokens"),
        ("web.yml", "unknown: 3", "metrics.web_config"),
        ("web.yml", None, "metrics.web_config"),
    ],
)
def test_what_is_fatal_is_what_a_start_refuses(files: Files, name: str, content: str | None, setting: str) -> None:
    """With the same setting first; a file that is missing or malformed."""
    path = files.folder / name
    path.unlink()
    if content is not None:
        files.write(name, content)
    fatal = [one for one in credential_findings(files.settings(), now_utc()) if one.fatal]
    assert fatal[0].setting == setting
    with pytest.raises(CredentialsError) as caught:
        protected(files.settings(), Metrics())
    assert caught.value.setting == setting
    assert caught.value.detail in fatal[0].detail


def test_all_wrong_files_are_named_at_once(files: Files) -> None:
    """A key of another certificate, a file of tokens without one, a short secret."""
    other = files.pki.server(stem="other")
    files.key.write_bytes(other.with_suffix(".key").read_bytes())
    files.write("tokens.toml", "")
    files.write("group.secret", "short")
    assert {setting for setting, fatal in found(files) if fatal} == {
        *("server.tls_key", "server.tokens", "metrics.web_config: tls_server_config.tls_key", "lane.secret_file"),
    }


def test_expiry_is_a_warning(files: Files) -> None:
    """A service starts with an expired certificate, and warns; tokens that have expired are named."""
    expires = now_utc() + timedelta(days=1)
    files.write("tokens.toml", as_table("olga", Role.OPERATOR, "text", expires))
    assert [(setting, fatal) for setting, fatal in found(files, timedelta(days=25))] == [
        ("server.tls_cert", False), ("server.tokens", False), ("server.tokens", False),
        ("metrics.web_config", False),
    ]  # fmt: skip
    details = [one.detail for one in credential_findings(files.settings(), now_utc() + timedelta(days=40))]
    assert "expired on" in details[0]
    assert "the token olga expired" in details[1]
    assert "no token is left" in details[2]


@pytest.mark.parametrize(
    ("name", "mode", "setting"),
    [
        ("server.key", 0o644, "server.tls_key"),
        ("server.key", 0o660, "server.tls_key"),
        ("tokens.toml", 0o622, "server.tokens"),
        ("web.yml", 0o622, "metrics.web_config"),
        ("server.pem", 0o666, "server.tls_cert"),
        ("group.secret", 0o604, "lane.secret_file"),
    ],
)
def test_permissions_that_are_too_open_are_warnings(files: Files, name: str, mode: int, setting: str) -> None:
    """What says who may call may not be written by others, and keys and secrets not be read by all."""
    (files.folder / name).chmod(mode)
    assert (setting, False) in found(files)


@pytest.mark.parametrize(("name", "mode"), [("server.key", 0o640), ("tokens.toml", 0o644), ("server.pem", 0o644)])
def test_permissions_that_are_usual_are_fine(files: Files, name: str, mode: int) -> None:
    """A key for a group, as mounted secrets have; digests and certificates that can be read."""
    (files.folder / name).chmod(mode)
    assert found(files) == []
