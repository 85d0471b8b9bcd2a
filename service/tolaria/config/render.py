"""Rendering of settings as TOML that `--config` reads back, without secrets."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, SecretStr

from tolaria.config.settings import Settings


def as_toml(settings: Settings) -> str:
    """Returns all sections and fields, each below its description; a secret is shown only as set or not set."""
    blocks = []
    for name, section in settings:
        lines = [f"# {(type(section).__doc__ or '').strip()}", f"[{name}]"]
        for field_name, field in type(section).model_fields.items():
            lines += [f"# {line}" for line in (field.description or "").splitlines()]
            lines.append(_assignment(section, field_name))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _assignment(section: BaseModel, name: str) -> str:
    value = section.model_dump()[name]
    if isinstance(value, SecretStr) and value:
        # A placeholder would be read back as the secret.
        return f"# {name} is set, not shown"
    return f"{name} = {_toml_value(section.model_dump(mode='json')[name])}"


def _toml_value(value: Any) -> str:
    """Scalars and lists of JSON are valid TOML; tables are written inline."""
    match value:
        case dict():
            items = ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items())
            return f"{{ {items} }}" if items else "{}"
        case list():
            return f"[{', '.join(map(_toml_value, value))}]"
        case _:
            return json.dumps(value)
