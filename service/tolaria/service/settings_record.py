"""The settings of a run's last process, kept in state.dir, so that a resumed run can report which have changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import structlog

from tolaria.checkpoint.directory import RUN_SETTINGS, SETTINGS
from tolaria.config import Settings

RUNS_MAX: Final = 1000
"""Runs of one directory whose settings are kept, a few kilobytes each."""

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
    directory = Path(settings.state.dir)
    text = json.dumps({"run_id": run_id, "settings": _visible(settings)}, indent=1)
    try:
        (directory / RUN_SETTINGS).mkdir(mode=0o700, exist_ok=True)
        for path in (directory / RUN_SETTINGS / f"{run_id}.json", directory / SETTINGS):
            _replace(path, text)
        _remove_oldest(directory / RUN_SETTINGS)
    except OSError as error:
        _log.warning("settings_not_recorded", detail=str(error))


def _replace(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


def _remove_oldest(folder: Path) -> None:
    """Keeps the settings of the newest RUNS_MAX runs."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in files[:-RUNS_MAX]:
        path.unlink(missing_ok=True)


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
