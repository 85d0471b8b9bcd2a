"""Where settings come from: a TOML file, the environment over it, the command line over both.

The only place that reads the process environment. Every mistake is told at once, each with its name and its origin.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsError, TomlConfigSettingsSource

from tolaria.config.tree import Settings
from tolaria.errors import ConfigurationError

DEFAULT_FILE = Path("tolaria.toml")
_PREFIX = "TOLARIA_"

_section_models: dict[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


def load_settings(config_file: Path | None = None, overrides: list[str] | None = None) -> Settings:
    """Build the settings from `config_file` (default: tolaria.toml where it exists), environment and `overrides`.

    `overrides` are `section.field=value` texts; values of tables and lists are JSON.

    Raises:
        ConfigurationError: with every problem found.
    """
    path = _existing_file(config_file)
    in_file = _read_toml(path) if path else {}
    on_command_line, problems = _parse_overrides(overrides or [])
    problems += _unknown_names(in_file, str(path)) + _unknown_environment()
    problems += _unknown_names(on_command_line, "--set")
    try:
        settings = _sourced(path)(**on_command_line)
    except ValidationError as error:
        origins = _Origins(in_file, on_command_line, str(path))
        # Unknown names are told already, with a guess at what was meant.
        wrong = [item for item in error.errors() if item["type"] != "extra_forbidden"]
        raise ConfigurationError(problems + [_sentence(item, origins) for item in wrong]) from None
    except SettingsError:
        raise ConfigurationError(problems + _malformed_json()) from None
    if problems:
        raise ConfigurationError(problems)
    return settings


def quieten_grpc() -> None:
    """Keep gRPC's C core from writing to standard error, where logs and live views are; call before it is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def child_environment(settings: Settings) -> dict[str, str]:
    """Environment for a peer process that Tolaria starts: its own, without settings, with the shared secrets."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_PREFIX)}
    secrets = {"SECRET": settings.leyline.secret, "PREVIOUS_SECRET": settings.leyline.previous_secret}
    for name, secret in secrets.items():
        if secret:
            environment[f"{_PREFIX}LEYLINE__{name}"] = secret.get_secret_value()
    return environment


def _existing_file(config_file: Path | None) -> Path | None:
    if config_file is None:
        return DEFAULT_FILE if DEFAULT_FILE.is_file() else None
    if not config_file.is_file():
        raise ConfigurationError([f"--config: no file {config_file}"])
    return config_file


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigurationError([f"{path}: {error}"]) from None


def _parse_overrides(overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    parsed: dict[str, Any] = {}
    problems = []
    for text in overrides:
        name, separator, value = text.partition("=")
        parts = name.strip().split(".")
        if not separator or len(parts) < 2 or not all(parts):
            problems.append(f"--set {text!r}: is not section.field=value")
            continue
        node = parsed
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        # A field knows how to read its text; what is deeper belongs to a job, which is given what the text says.
        node[parts[-1]] = _value(value) if len(parts) == 2 else _json_or_text(value)
    return parsed, problems


def _value(text: str) -> Any:
    """JSON where the text is a table or a list, else the text itself: each field knows how to read it."""
    if text[:1] in {"{", "["}:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    return text


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _unknown_names(values: dict[str, Any], origin: str) -> list[str]:
    problems = []
    for section, fields in values.items():
        known = list(_section_models[section].model_fields) if section in _section_models else []
        if not known:
            problems.append(_unknown(section, list(_section_models), f"{section}: unknown section ({origin})"))
        elif not isinstance(fields, dict):
            problems.append(f"{section}: is a section, not a value ({origin})")
        else:
            problems += [
                _unknown(field, known, f"{section}.{field}: unknown field ({origin})")
                for field in fields
                if field not in known
            ]
    return problems


def _unknown_environment() -> list[str]:
    values: dict[str, Any] = {}
    problems = []
    for name in sorted(os.environ):
        if not name.startswith(_PREFIX):
            continue
        section, separator, field = name.removeprefix(_PREFIX).lower().partition("__")
        if not separator:
            problems.append(f"{name}: is not TOLARIA_<SECTION>__<FIELD>")
        values.setdefault(section, {})[field] = name
    return problems or _unknown_names(values, "environment")


def _malformed_json() -> list[str]:
    """The environment variables of tables and lists that are not JSON: all that a SettingsError can mean."""
    problems = []
    for name in sorted(os.environ):
        section, _, field = name.removeprefix(_PREFIX).lower().partition("__")
        if name.startswith(_PREFIX) and _is_complex(section, field):
            try:
                json.loads(os.environ[name])
            except json.JSONDecodeError as error:
                problems.append(f"{section}.{field}: is not JSON: {error} (environment {name})")
    return problems


def _is_complex(section: str, field: str) -> bool:
    annotation = _section_models[section].model_fields[field].annotation
    return get_origin(annotation) in {dict, list}


def _unknown(name: str, known: list[str], sentence: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"{sentence}; did you mean {close[0]}?" if close else f"{sentence}; known are {', '.join(known)}"


def _sourced(path: Path | None) -> type[Settings]:
    class Sourced(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is the library's
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is the library's
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=path)

    return Sourced


class _Origins:
    """Tells from which source the value of a field came."""

    def __init__(self, in_file: dict[str, Any], on_command_line: dict[str, Any], file_name: str) -> None:
        self._in_file, self._on_command_line, self._file_name = in_file, on_command_line, file_name

    def of(self, section: str, field: str) -> str:
        if field in self._on_command_line.get(section, {}):
            return "--set"
        variable = f"{_PREFIX}{section}__{field}".upper()
        if variable in os.environ:
            return f"environment {variable}"
        return self._file_name if field in self._in_file.get(section, {}) else "default"


def _sentence(item: Any, origins: _Origins) -> str:
    """One validation error as `section.field: what is wrong, got value (origin)`; secrets are never shown."""
    location = [str(part) for part in item["loc"]]
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if len(location) < 2:
        return message
    section, field = location[:2]
    shown = "" if "secret" in field or item["type"] == "value_error" else f", got {item['input']!r}"
    return f"{'.'.join(location)}: {message}{shown} ({origins.of(section, field)})"
