from __future__ import annotations

from pathlib import Path

import pytest

from tolaria.config import Connection, connection, load_settings
from tolaria.config.connections import CLIENT_NAMES
from tolaria.errors import ConfigurationError

PROFILES = """
default = "lab"

[lab]
address = "gpu1:50051"
token_file = "lab.token"
tls_ca = "/etc/ca.pem"

[cloud]
address = "cloud:443"
tls_ca = "system"
token_file = "~/cloud.token"

[wrong]
adress = "x:1"
tls_ca = 1

[bad]
address = "x"
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, working directory and environment."""
    for name in CLIENT_NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def profiles(home: Path) -> Path:
    """The file with profiles where it is by default."""
    path = home / "config" / "tolaria" / "profiles.toml"
    path.parent.mkdir(parents=True)
    path.write_text(PROFILES)
    return path


def test_without_anything_the_settings_decide() -> None:
    """No file is no problem."""
    assert connection() == Connection()


def test_the_variables_of_clients_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service or a command that reads settings does not refuse them; one with a typing error it does, with a hint."""
    for name in CLIENT_NAMES:
        monkeypatch.setenv(name, "x")
    load_settings()
    monkeypatch.setenv("TOLARIA_ADRESS", "x")
    with pytest.raises(ConfigurationError, match=r"TOLARIA_ADRESS: is not .* did you mean TOLARIA_ADDRESS\?"):
        load_settings()


def test_the_variables_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sets its field; an empty one is not set."""
    monkeypatch.setenv("TOLARIA_ADDRESS", "gpu9:1")
    monkeypatch.setenv("TOLARIA_TOKEN_FILE", "token")
    monkeypatch.setenv("TOLARIA_TLS_CA", "")
    found = connection()
    assert (found.address, found.token_file, found.tls_ca) == ("gpu9:1", "token", "")


def test_the_default_profile_is_used(profiles: Path) -> None:
    """Its relative paths are those of the file's folder."""
    found = connection()
    assert (found.address, found.tls_ca) == ("gpu1:50051", "/etc/ca.pem")
    assert found.token_file == str(profiles.parent / "lab.token")


def test_an_address_replaces_the_default_profile(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its token is for its service: it is not sent to another address, nor is its CA expected there."""
    assert connection(address="localhost:7") == Connection()
    monkeypatch.setenv("TOLARIA_ADDRESS", "localhost:7")
    assert (connection().address, connection().tls_ca, connection().token_file) == ("localhost:7", "", "")


def test_a_variable_precedes_the_profile_of_another(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Field by field: who names both wants both."""
    monkeypatch.setenv("TOLARIA_PROFILE", "cloud")
    monkeypatch.setenv("TOLARIA_ADDRESS", "localhost:7")
    assert (connection().address, connection().tls_ca) == ("localhost:7", "system")
    monkeypatch.delenv("TOLARIA_ADDRESS")
    monkeypatch.setenv("TOLARIA_TOKEN_FILE", "other")
    assert (connection().address, connection().token_file) == ("cloud:443", "other")


def test_a_named_profile_holds_entirely(profiles: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of the environment is not sent to another service; ~ is the home."""
    monkeypatch.setenv("TOLARIA_ADDRESS", "localhost:7")
    monkeypatch.setenv("TOLARIA_TOKEN_FILE", "other")
    found = connection("cloud")
    assert (found.address, found.token_file) == ("cloud:443", str(home / "cloud.token"))


def test_the_file_can_be_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TOLARIA_PROFILES names it; then it has to exist."""
    monkeypatch.setenv("TOLARIA_PROFILES", str(home / "p.toml"))
    with pytest.raises(ConfigurationError, match=r"there is no file .*p\.toml"):
        connection()
    (home / "p.toml").write_text(PROFILES)
    assert connection().address == "gpu1:50051"


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("lap", "--profile: .*has no profile 'lap'; did you mean lab"),
        ("wrong", r"wrong.adress: unknown field; did you mean address\?"),
        ("wrong", "wrong.tls_ca: must be a text"),
        ("bad", "bad.address: 'x' is not host:port"),
    ],
)
def test_a_wrong_profile_is_refused(profile: str, words: str, profiles: Path) -> None:
    """The message names the file, the profile and the field."""
    with pytest.raises(ConfigurationError, match=words):
        connection(profile)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TOLARIA_ADDRESS": "nowhere"}, "TOLARIA_ADDRESS: 'nowhere' is not host:port"),
        ({"TOLARIA_TLS_CA": "c", "TOLARIA_TLS_CERT": "x"}, "TOLARIA_TLS_KEY"),
        ({"TOLARIA_TLS_CERT": "x", "TOLARIA_TLS_KEY": "x"}, "TOLARIA_TLS_CA"),
        ({"TOLARIA_TLS_NAME": "x"}, "TOLARIA_TLS_CA"),
        ({"TOLARIA_PROFILE": "none"}, "there is no file"),
    ],
)
def test_wrong_variables_are_refused(variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the variable."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=words):
        connection()
