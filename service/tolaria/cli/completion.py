"""Completion of ids in a shell, from the names in a local state directory: no service is called, no journal is read."""

# ruff: noqa: PLC0415 - as in `tolaria.cli.commands`: --help imports nothing slow
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import typer

from tolaria.errors import TolariaError

_CHECKPOINTS: Final = "checkpoints"
_RUNS: Final = "runs"
_TEMPORARY: Final = "."


def complete_checkpoint(ctx: typer.Context, incomplete: str) -> list[str]:
    """Returns the ids of checkpoints that begin like this, the newest first."""
    names = [path.name for folder in _directories(ctx) for path in _entries(folder / _CHECKPOINTS)]
    return _matching(sorted(names, reverse=True), incomplete)


def complete_export(ctx: typer.Context, incomplete: str) -> list[str]:
    """Returns what `export --checkpoint` takes: two words, and ids."""
    return [*_matching(("newest", "best"), incomplete), *complete_checkpoint(ctx, incomplete)]


def complete_run(ctx: typer.Context, incomplete: str) -> list[str]:
    """Returns the ids of runs that begin like this, the newest first, and `newest`."""
    files = [path for folder in _directories(ctx) for path in _entries(folder / _RUNS) if path.suffix == ".json"]
    files.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return _matching(["newest", *(path.stem for path in files)], incomplete)


def _directories(ctx: typer.Context) -> Iterator[Path]:
    """Yields the state directories that the line names so far, or that of the settings."""
    given = [*(ctx.params.get("state_dirs") or ()), *filter(None, [ctx.params.get("state_dir")])]
    if given:
        yield from map(Path, given)
        return
    from tolaria.config import load_settings

    with suppress(TolariaError):  # the command itself says what is wrong with the settings
        yield Path(load_settings(ctx.params.get("config_file"), ctx.params.get("overrides") or []).state.dir)


def _entries(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(_TEMPORARY)]
    except OSError:
        return []


def _matching(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
