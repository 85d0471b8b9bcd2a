"""`tolaria state`: the schema of a state directory, and the way back to an older one."""

# ruff: noqa: PLC0415 - as in `tolaria.cli.commands`: --help imports nothing slow
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tolaria.cli import render
from tolaria.cli.admin_commands import ConfigFile, Overrides
from tolaria.cli.errors import CommandFailedError

if TYPE_CHECKING:
    from tolaria.checkpoint.archive import BackupManifest
    from tolaria.checkpoint.upgrade import StateDescription
    from tolaria.journal.rows import VersionRow

state_app = typer.Typer(help="Show or downgrade the schema of a state directory.", no_args_is_help=True)

StateDir = Annotated[
    Path | None, typer.Option("--state-dir", metavar="DIR", help="State directory (default: state.dir).")
]


@state_app.command()
def show(
    *,
    state_dir: StateDir = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the schema, the versions of Tolaria that have used the directory, and the copies from before upgrades.

    Changes nothing, and needs no lock: a service may use the directory.
    """
    directory = existing_state(state_dir, config_file, overrides)
    from tolaria.checkpoint.upgrade import describe_state

    with system_errors(directory):
        found = describe_state(directory)
    if as_json:
        backups = [{"path": path, **backup_summary(manifest)} for path, manifest in found.backups]
        typer.echo(json.dumps({**asdict(found), "backups": backups}, indent=2))
    else:
        _show(found)


@state_app.command()
def downgrade(
    *,
    to: Annotated[int, typer.Option("--to", metavar="SCHEMA", help="Schema that the older version supports.")],
    state_dir: StateDir = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Bring the directory to an older schema, so that an older version of Tolaria can use it, after a backup.

    No service may use the directory. Refused, with exit code 2, if the older schema cannot hold the state.
    """
    directory = existing_state(state_dir, config_file, overrides)
    from tolaria.checkpoint.directory import locked_directory
    from tolaria.checkpoint.upgrade import downgrade_state

    with system_errors(directory), locked_directory(directory):
        done = downgrade_state(directory, to)
    if as_json:
        typer.echo(json.dumps(asdict(done), indent=2))
        return
    typer.echo(
        f"{directory}: schema {done.schema_from} -> {done.schema_to}; before that it was copied to {done.backup}"
    )
    for table, count in done.lost.items():
        if count:
            typer.echo(
                f"  {table}: {count} rows are only in this copy, since schema {done.schema_to} has no such table"
            )


def existing_state(state_dir: Path | None, config_file: Path | None, overrides: list[str] | None) -> Path:
    """Returns the state directory, which holds a journal. Raises ConfigurationError, StateRefusedError."""
    from tolaria.checkpoint.directory import require_state

    directory, origin = chosen_directory(state_dir, config_file, overrides)
    require_state(directory, origin)
    return directory


def chosen_directory(state_dir: Path | None, config_file: Path | None, overrides: list[str] | None) -> tuple[Path, str]:
    """Returns the state directory, and the name of the option or setting that names it. Raises ConfigurationError."""
    if state_dir is not None:
        return state_dir, "--state-dir"
    from tolaria.config import load_settings

    return Path(load_settings(config_file, overrides or []).state.dir), "state.dir"


@contextmanager
def system_errors(directory: Path) -> Iterator[None]:
    """Raises CommandFailedError for errors of the operating system."""
    try:
        yield
    except OSError as error:
        place = error.filename or directory
        raise CommandFailedError(f"{place}: {error.strerror or error}") from None


def time_text(at_ns: int) -> str:
    """Returns a time in UTC, with seconds."""
    return datetime.fromtimestamp(at_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def backup_summary(manifest: BackupManifest) -> dict[str, object]:
    """Returns the manifest of a backup as JSON values, with the number and the size of its files."""
    values = {name: value for name, value in asdict(manifest).items() if name != "files"}
    return {**values, "files": len(manifest.files), "size_bytes": manifest.size_bytes}


def _show(found: StateDescription) -> None:
    typer.echo(
        f"{found.directory}: schema {found.schema}; this is Tolaria {found.tolaria} with schema {found.supported}"
    )
    typer.echo(f"  {found.verdict}")
    if found.schema > found.supported:
        return
    size = render.size(found.checkpoint_bytes)
    typer.echo(f"  {found.runs} runs, {found.checkpoints} checkpoints that can be restored ({size})")
    for row in found.versions:
        typer.echo(f"  {time_text(row.at_ns)}: {_version(row)}")
    for path, manifest in found.backups:
        made = f"schema {manifest.schema}, {render.size(manifest.size_bytes)}, by Tolaria {manifest.tolaria}"
        typer.echo(f"  {path}: {made}, {time_text(manifest.created_at_ns)}")


def _version(row: VersionRow) -> str:
    if not row.schema_from:
        return f"created by Tolaria {row.tolaria} with schema {row.schema_to}"
    if row.schema_from == row.schema_to:
        return f"used by Tolaria {row.tolaria}"
    return f"upgraded by Tolaria {row.tolaria} from schema {row.schema_from} to {row.schema_to}"
