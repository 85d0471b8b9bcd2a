"""The settings in force as TOML text that `--config` reads back. Secrets are left out."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, SecretStr

from tolaria.config.tree import Settings


def as_toml(settings: Settings) -> str:
    """Every section and field with its value, documented above it; of a secret, only whether it is set."""
    blocks = []
    for section, section_field in type(settings).model_fields.items():
        values = getattr(settings, section)
        lines = [f"[{section}]"]
        for name, field in type(values).model_fields.items():
            lines += [f"# {line}" for line in (field.description or "").splitlines()]
            lines.append(_line(values, name))
        summary = (section_field.annotation.__doc__ or "").strip() if section_field.annotation else ""
        blocks.append("\n".join([f"# {summary}", *lines]))
    return "\n\n".join(blocks) + "\n"


def _line(section: BaseModel, name: str) -> str:
    value = section.model_dump()[name]
    if isinstance(value, SecretStr) and value:
        # Whatever stood in its place would be read back as the secret.
        return f"# {name} is set, not shown"
    return f"{name} = {_toml_value(section.model_dump(mode='json')[name])}"


def _toml_value(value: Any) -> str:
    """JSON's scalars and lists are TOML's too; a table is written inline."""
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items()) + " }" if value else "{}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return json.dumps(value)
