"""How client commands reach a service: the environment, and named profiles in one file.

The file is TOML, by default `~/.config/tolaria/profiles.toml`, with a table for each profile:

    default = "lab"

    [lab]
    address = "gpu1.example:50051"
    token_file = "lab.token"        # paths are relative to the file's folder
    tls_ca = "lab-ca.pem"
    tls_cert = "me.pem"             # with mutual TLS
    tls_key = "me.key"
    tls_name = "tolaria"            # if the certificate has another name than the address

`tls_ca = "system"` verifies the service by the CAs of the system.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from tolaria.config.fields import Address, suggestion
from tolaria.errors import ConfigurationError

SYSTEM_CAS: Final = "system"


@dataclass(frozen=True, slots=True)
class Connection:
    """Where a service is, and what a client presents to it; empty where nothing is given. `origin` is for errors."""

    address: str = ""
    token_file: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_name: str = ""
    origin: str = ""


VARIABLES: Final[Mapping[str, str]] = {
    f"TOLARIA_{field.name.upper()}": field.name for field in fields(Connection) if field.name != "origin"
}
"""The variables of clients, by the field that each sets."""

PROFILE: Final = "TOLARIA_PROFILE"
"""The variable with the name of a profile."""

PROFILES: Final = "TOLARIA_PROFILES"
"""The variable with the path of the file."""

CLIENT_NAMES: Final = frozenset({*VARIABLES, PROFILE, PROFILES})
"""Variables that begin as settings do and are none."""

_PATHS = ("token_file", "tls_ca", "tls_cert", "tls_key")


def connection(profile: str | None = None, *, address: str | None = None) -> Connection:
    """Returns the connection of client commands, whose `address` may be given elsewhere.

    A `profile` that is named holds entirely, so that no token of another service is sent. Otherwise the variables
    hold, each before the same field of the profile in TOLARIA_PROFILE. The default profile of the file is used where
    neither it nor an address is named: it is about one service.

    Raises:
        ConfigurationError: a profile is unknown, or a value is invalid.
    """
    if profile is not None:
        return _checked(_profile(profile, "--profile"))
    found = {field: os.environ[name] for name, field in VARIABLES.items() if os.environ.get(name)}
    base = Connection()
    if name := os.environ.get(PROFILE, ""):
        base = _profile(name, PROFILE)
    elif address is None and "address" not in found:
        base = _default()
    return _checked(replace(base, **found, origin="TOLARIA_ADDRESS" if "address" in found else base.origin))


def profiles_file() -> Path:
    """Returns the path of the file with the profiles."""
    if path := os.environ.get(PROFILES):
        return Path(path)
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(home) / "tolaria" / "profiles.toml"


def _default() -> Connection:
    path = profiles_file()
    if not path.is_file() and PROFILES not in os.environ:
        return Connection()
    name = _read(path).get("default")
    if name is not None and not isinstance(name, str):
        raise ConfigurationError([f"{path}: default must be the name of a profile"])
    return _profile(name, f"{path}: default") if name else Connection()


def _profile(name: str, origin: str) -> Connection:
    path = profiles_file()
    content = _read(path)
    tables = {key: table for key, table in content.items() if isinstance(table, dict)}
    if name not in tables:
        hint = suggestion(name, tables) if tables else "it has none"
        raise ConfigurationError([f"{origin}: {path} has no profile {name!r}; {hint}"])
    known = set(VARIABLES.values())
    values, problems = {}, []
    for key, value in tables[name].items():
        if key not in known:
            problems.append(f"{path}: {name}.{key}: unknown field; {suggestion(key, sorted(known))}")
        elif not isinstance(value, str):
            problems.append(f"{path}: {name}.{key}: must be a text")
        else:
            values[key] = _resolved(path, key, value)
    if problems:
        raise ConfigurationError(problems)
    return Connection(**values, origin=f"{path}: {name}.address")


def _resolved(path: Path, key: str, value: str) -> str:
    """Returns a value of the file; a path is relative to the folder of the file."""
    if key not in _PATHS or not value or (key == "tls_ca" and value == SYSTEM_CAS):
        return value
    return str(path.parent / Path(value).expanduser())


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError([f"there is no file {path} with profiles"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigurationError([f"{path}: {error}"]) from None


def _checked(found: Connection) -> Connection:
    problems = []
    if found.address:
        try:
            Address.parse(found.address)
        except ValueError as error:
            problems.append(f"{found.origin}: {error}")
    if bool(found.tls_cert) != bool(found.tls_key):
        problems.append("tls_cert and tls_key (TOLARIA_TLS_CERT, TOLARIA_TLS_KEY) must be given together")
    if (found.tls_cert or found.tls_name) and not found.tls_ca:
        problems.append("tls_ca (TOLARIA_TLS_CA) must be given with tls_cert or tls_name")
    if problems:
        raise ConfigurationError(problems)
    return found
