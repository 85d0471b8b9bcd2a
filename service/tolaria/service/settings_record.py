"""The settings of a run's last process, kept in state.dir, so that a resumed run can report which have changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from tolaria.checkpoint.directory import SETTINGS
from tolaria.config import Settings

_log = structlog.get_logger(__name__)


def report_changes(settings: Settings, run_id: str, learning_rates: Mapping[str, float]) -> None:
    """Logs one line that names the settings that differ from those of the resumed run's last process, and the outcome.

    `learning_rates` are those in force, by param group. A missing or unreadable record, as of an earlier version, is
    no change.
    """
    try:
        record = json.loads((Path(settings.state.dir) / SETTINGS).read_text(encoding="utf-8"))
        known = dict(_flat(record["settings"])) if record["run_id"] == run_id else {}
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("settings_record_unreadable", detail=f"{type(error).__name__}: {error}")
        return
    now = dict(_flat(_visible(settings)))
    names = [name for name in sorted(known.keys() | now.keys()) if known.get(name) != now.get(name)] if known else []
    if names:
        _log.warning(
            "settings_changed",
            changed={name: f"{_text(known.get(name))} -> {_text(now.get(name))}" for name in names},
            learning_rates=dict(learning_rates),
            detail="the new settings are in force, except that the optimizer's options and base learning rates are "
            "those of the checkpoint: change them with AdjustLearningRate, or begin a new run",
        )


def record(settings: Settings, run_id: str) -> None:
    """Writes the settings of this process, without secrets, with mode 0600. A failure is logged."""
    path = Path(settings.state.dir) / SETTINGS
    new = path.with_name(SETTINGS + ".new")
    text = json.dumps({"run_id": run_id, "settings": _visible(settings)}, indent=1)
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
            file.write(text)
        new.replace(path)
    except OSError as error:
        _log.warning("settings_not_recorded", detail=str(error))


def _visible(settings: Settings) -> dict[str, Any]:
    """Returns the settings as JSON values; secrets are masked."""
    return settings.model_dump(mode="json")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _text(value: object) -> str:
    return "unset" if value is None else json.dumps(value)
