"""Presets: values of several settings under one name, chosen by `preset`; every source overrides them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from tolaria.config.fields import suggestion

PRESET: Final = "preset"
"""The name by which a source chooses one: `--set preset=plain`, TOLARIA_PRESET, or `preset` at the top of the file."""

PRESETS: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = MappingProxyType(
    {
        "full": {},
        "plain": {"control": {"enabled": False}, "seeds": {"enabled": False}, "health": {"policy": "skip"}},
    }
)
"""full: the defaults. plain: just train: no controller and no seeds, bad batches are skipped, and training is rolled
back on request only; with checkpoints, resumption, metrics and operators' requests."""


def preset_values(chosen: object, source: str) -> dict[str, dict[str, Any]]:
    """Returns the values of a preset by section and field, for a name that is from this source.

    Raises:
        ValueError: there is none of this name; the message says what may have been meant.
    """
    if not isinstance(chosen, str) or chosen not in PRESETS:
        raise ValueError(f"{PRESET}: there is no preset {chosen!r} ({source}); {suggestion(str(chosen), PRESETS)}")
    return {section: dict(fields) for section, fields in PRESETS[chosen].items()}
