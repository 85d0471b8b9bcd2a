"""Settings of earlier versions that have lost their meaning: accepted from every source, with one warning each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

RETIRED: Final[Mapping[tuple[str, str], str]] = MappingProxyType(
    {
        ("control", "max_void_steps"): "health.skips_max",
        ("rollback", "loss_factor"): "",
        ("rollback", "norm_factor"): "",
        ("rollback", "warmup_steps"): "",
        ("rollback", "halt_on_deadline"): "",
        ("emergency", "rollback"): "",
    }
)
"""The setting, as section and field, that replaced each; empty where none did and the value has no effect."""


def take_retired(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    """Returns the values of one source, by section and field, without retired settings; and those that it has."""
    kept, found = dict(values), {}
    for section, field in RETIRED:
        fields = kept.get(section)
        if isinstance(fields, dict) and field in fields:
            found[section, field] = fields[field]
            kept[section] = {name: value for name, value in fields.items() if name != field}
    return kept, found


def with_replacements(values: dict[str, Any], retired: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    """Returns the merged values, in which each replacement that no source sets has the retired setting's value."""
    completed = dict(values)
    for name, value in retired.items():
        section, separator, field = RETIRED[name].partition(".")
        if separator:
            completed[section] = {field: value} | completed.get(section, {})
    return completed


def warning(name: tuple[str, str]) -> str:
    """Returns the sentence about a retired setting that a source sets."""
    replacement, setting = RETIRED[name], ".".join(name)
    if replacement:
        return f"{setting} is retired: use {replacement}, which takes its value unless it is set itself"
    return f"{setting} is retired and has no effect: remove it"
