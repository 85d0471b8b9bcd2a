"""The sources of settings, each overriding the one before: a TOML file, the environment, the command line.

No other module reads the process environment.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_settings import EnvSettingsSource, SettingsError

from tolaria.config.connections import CLIENT_NAMES
from tolaria.config.fields import suggestion
from tolaria.config.presets import PRESET, preset_values
from tolaria.config.retired import take_retired, warning, with_replacements
from tolaria.config.settings import Settings
from tolaria.errors import ConfigurationError

DEFAULT_FILE = Path("tolaria.toml")
_PREFIX = "TOLARIA_"
_ENVIRONMENT = "environment"
_SECTIONS: dict[str, type[BaseModel]] = {
    name: section.annotation
    for name, section in Settings.model_fields.items()
    if isinstance(section.annotation, type) and issubclass(section.annotation, BaseModel)
}


@dataclass(slots=True)
class _Source:
    """Values by section and field, and the problems found while reading them."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    preset: object = None
    problems: list[str] = field(default_factory=list)


def load_settings(config_file: Path | None = None, overrides: list[str] | None = None) -> Settings:
    """Builds the settings from `config_file` (default: tolaria.toml, if it exists), the environment and `overrides`.

    Overrides have the form `section.field=value`; tables and lists are JSON. Retired settings are accepted, and
    listed in `Settings.notices`.

    Raises:
        ConfigurationError: with all problems of all sources.
    """
    sources = [_read_file(config_file), _read_environment(), _read_overrides(overrides or [])]
    problems: list[str] = []
    merged: dict[str, Any] = _preset(sources, problems)
    retired: dict[tuple[str, str], Any] = {}
    for source in sources:
        source.values, found = take_retired(source.values)
        retired |= found
        problems += [*source.problems, *_unknown_names(source)]
        source.values = {name: section for name, section in source.values.items() if isinstance(section, dict)}
        merged = _merged(merged, source.values)
    try:
        settings = Settings.model_validate(with_replacements(merged, retired))
    except ValidationError as error:
        # Unknown names are among the problems already, with a suggestion.
        invalid = [item for item in error.errors() if item["type"] != "extra_forbidden"]
        raise ConfigurationError(problems + [_describe(item, sources) for item in invalid]) from None
    if problems:
        raise ConfigurationError(problems)
    settings.take_notices(warning(name) for name in retired)
    return settings


@dataclass(frozen=True, slots=True)
class SettingsSources:
    """The sources of a service's settings, which can be read again. `config_file` is absolute, or None: the default."""

    config_file: Path | None
    overrides: tuple[str, ...]

    @classmethod
    def of(cls, config_file: Path | None, overrides: list[str]) -> SettingsSources:
        """Returns those that `load_settings` reads now. A default file that exists has to exist later, too."""
        if config_file is None and DEFAULT_FILE.is_file():
            config_file = DEFAULT_FILE
        return cls(config_file and config_file.absolute(), tuple(overrides))

    def read(self) -> Settings:
        """Returns what they say now. Raises ConfigurationError."""
        return load_settings(self.config_file, list(self.overrides))


def quieten_grpc() -> None:
    """Stops gRPC's C core from writing to standard error, where logs are written. Call this before importing grpc."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def bare_environment() -> dict[str, str]:
    """Returns this process's environment without settings and secrets, for a child that runs a job's code."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(_PREFIX)}


def child_environment(settings: Settings, *, secrets: bool = True) -> dict[str, str]:
    """Returns the environment of a child process: this process's own, without settings except, if asked, the secrets.

    The peers sign and verify with them; the lane runs the job's code, which has no use for them. Traces that are off
    are off there, too.
    """
    environment = bare_environment()
    for name, secret in (("secret", settings.leyline.secret), ("previous_secret", settings.leyline.previous_secret)):
        if secret and secrets:
            environment[_variable("leyline", name)] = secret.get_secret_value()
    if settings.telemetry.traces == "off":  # else the peer finds the same variables of OpenTelemetry
        environment[_variable("telemetry", "traces")] = "off"
    return environment


def _read_file(config_file: Path | None) -> _Source:
    if config_file is None and not DEFAULT_FILE.is_file():
        return _Source(str(DEFAULT_FILE))
    path = config_file or DEFAULT_FILE
    if not path.is_file():
        raise ConfigurationError([f"--config: there is no file {path}"])
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return _Source(str(path), values, values.pop(PRESET, None))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigurationError([f"{path}: {error}"]) from None


def _read_environment() -> _Source:
    source = _Source(_ENVIRONMENT)
    texts = []
    for name in sorted(name for name in os.environ if name.upper().startswith(_PREFIX)):
        section, separator, field_name = name[len(_PREFIX) :].lower().partition("__")
        if name.upper() in CLIENT_NAMES:
            continue
        if (section, separator) == (PRESET, ""):
            source.preset = os.environ[name]
        elif separator:
            texts.append((section, field_name, os.environ[name]))
            source.values.setdefault(section, {})[field_name] = os.environ[name]
        else:
            hint = difflib.get_close_matches(name.upper(), CLIENT_NAMES, n=1)
            meant = f"; did you mean {hint[0]}?" if hint else ""
            source.problems.append(f"{name}: is not TOLARIA_<SECTION>__<FIELD>{meant}")
    try:
        source.values = _merged(source.values, EnvSettingsSource(Settings)())
    except SettingsError:  # some text is not JSON; the error does not name the variable
        source.values = {}
        for section, field_name, text in texts:
            _set_text(source, section, field_name, text)
    return source


def _read_overrides(overrides: list[str]) -> _Source:
    source = _Source("--set")
    for text in overrides:
        name, separator, value = text.partition("=")
        parts = name.strip().split(".")
        if separator and parts == [PRESET]:
            source.preset = value
        elif not separator or len(parts) < 2 or not all(parts):
            source.problems.append(f"--set {text!r}: is not section.field=value")
        elif len(parts) == 2:
            _set_text(source, parts[0], parts[1], value)
        else:
            # The keys of a table have no declared type: the value is JSON if it is valid JSON, else text.
            nested = _json_or_text(value)
            for part in reversed(parts):
                nested = {part: nested}
            source.values = _merged(source.values, nested)
    return source


def _preset(sources: list[_Source], problems: list[str]) -> dict[str, Any]:
    """Returns the values of the preset that the last of the sources with one chooses."""
    source = next((source for source in reversed(sources) if source.preset is not None), None)
    try:
        return {} if source is None else preset_values(source.preset, source.name)
    except ValueError as error:
        problems.append(str(error))
        return {}


def _set_text(source: _Source, section: str, field_name: str, text: str) -> None:
    """Sets a field to a text, which is JSON if the field is a table or a list; pydantic converts other types."""
    value: Any = text
    model = _SECTIONS.get(section)
    declared = model.model_fields.get(field_name) if model else None
    if declared and get_origin(declared.annotation) in {dict, list}:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            origin = _origin(source, section, field_name)
            source.problems.append(f"{section}.{field_name}: is not JSON: {error} ({origin})")
            return
    source.values.setdefault(section, {})[field_name] = value


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _merged(low: Any, high: Any) -> Any:
    """Merges tables recursively; any other value of `high` replaces that of `low`."""
    if isinstance(low, dict) and isinstance(high, dict):
        return low | {key: _merged(low.get(key), value) for key, value in high.items()}
    return high


def _unknown_names(source: _Source) -> Iterator[str]:
    for section, fields in source.values.items():
        if section not in _SECTIONS:
            yield f"{section}: unknown section ({source.name}); {suggestion(section, _SECTIONS)}"
        elif not isinstance(fields, dict):
            yield f"{section}: is a section, not a value ({source.name})"
        else:
            known = _SECTIONS[section].model_fields
            for name in [name for name in fields if name not in known]:
                yield f"{section}.{name}: unknown field ({source.name}); {suggestion(name, known)}"


def _describe(item: Any, sources: list[_Source]) -> str:
    """Formats a validation error as `section.field: message, got value (origin)`, without the value of a secret."""
    location = [str(part) for part in item["loc"]]
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if len(location) < 2:
        return message
    section, name = location[:2]
    shown = "" if "secret" in name or item["type"] == "value_error" else f", got {item['input']!r}"
    origins = [_origin(source, section, name) for source in sources if name in source.values.get(section, {})]
    return f"{'.'.join(location)}: {message}{shown} ({origins[-1] if origins else 'default'})"


def _origin(source: _Source, section: str, name: str) -> str:
    return f"{_ENVIRONMENT} {_variable(section, name)}" if source.name == _ENVIRONMENT else source.name


def _variable(section: str, name: str) -> str:
    return f"{_PREFIX}{section}__{name}".upper()
