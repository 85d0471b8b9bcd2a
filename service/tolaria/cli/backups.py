"""`tolaria backup` and `tolaria restore-backup`: copies of a state directory, also while a service uses it."""

# ruff: noqa: PLC0415 - as in `tolaria.cli.commands`: --help imports nothing slow
from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tolaria.cli import render
from tolaria.cli.admin_commands import ConfigFile, Overrides
from tolaria.cli.state_commands import (
    StateDir,
    backup_summary,
    chosen_directory,
    existing_state,
    system_errors,
    time_text,
)

if TYPE_CHECKING:
    from tolaria.checkpoint.archive import BackupManifest
    from tolaria.checkpoint.rotation import Rotated

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def backup(
    *,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR|FILE.tar", help="New directory, or new .tar file.")
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            "--into", metavar="DIR", help="Instead: a directory for backups of this state, named by their time."
        ),
    ] = None,
    keep: Annotated[
        int, typer.Option("--keep", min=0, help="With --into: remove all but the newest N. 0: keep all.")
    ] = 0,
    without_damaged: Annotated[
        bool, typer.Option("--without-damaged", help="Leave out damaged checkpoints instead of failing.")
    ] = False,
    state_dir: StateDir = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Copy journal and checkpoints consistently, also while a service uses the directory, and verify the copy.

    The backup gets its name once it is whole and everything has been read back. Exit code 1 if it could not be made,
    2 if the directory or the name is wrong.
    """
    place = to or into
    if place is None or (to and into):
        raise typer.BadParameter("give one of --to and --into")
    if keep and into is None:
        raise typer.BadParameter("--keep is about the backups of --into")
    directory = existing_state(state_dir, config_file, overrides)
    started_s = time.monotonic()
    made = _made(directory, place, keep if into else None, without_damaged=without_damaged)
    took_s = round(time.monotonic() - started_s, 3)
    if as_json:
        answer = {"path": str(made.path), "took_s": took_s, "removed": made.removed, "unusable": made.damaged}
        answer |= {"unremoved": made.unremoved}
        typer.echo(json.dumps({**answer, **backup_summary(made.manifest)}, indent=2))
        return
    typer.echo(f"{made.path}: {_contents(made.manifest)}; read back and verified in {took_s:.1f} s")
    if made.removed:
        typer.echo(f"  removed: {', '.join(made.removed)}")
    for name in made.damaged:
        typer.echo(f"  {name} cannot be restored; it stays, and is not counted", err=True)
    for sentence in made.unremoved:
        typer.echo(f"  {sentence}", err=True)
    _report_gaps(made.manifest)


def _made(directory: Path, place: Path, keep: int | None, *, without_damaged: bool) -> Rotated:
    """Makes a backup with the name `place`, or, if a number is to be kept, in the directory `place`."""
    from tolaria.checkpoint.backup import make_backup
    from tolaria.checkpoint.rotation import Rotated, make_rotated_backup

    with system_errors(place):
        if keep is not None:
            return make_rotated_backup(
                directory, place, keep, without_damaged=without_damaged, on_checkpoint=_show_progress
            )
        manifest = make_backup(directory, place, without_damaged=without_damaged, on_checkpoint=_show_progress)
    return Rotated(place, manifest)


def restore_backup(
    *,
    source: Annotated[Path, typer.Option("--from", metavar="DIR|FILE.tar", help="Backup to restore.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the state that is there; it is moved to a directory in it.")
    ] = False,
    state_dir: StateDir = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Restore a backup into a new or empty state directory, and verify every digest.

    No service may use the directory; the next one continues the run of the backup. Exit code 1 if the backup is damaged
    or cannot be restored, 2 if the directory is in use or not empty, or a newer version made the backup.
    """
    directory, _ = chosen_directory(state_dir, config_file, overrides)
    from tolaria.checkpoint.directory import locked_directory, remove_unused
    from tolaria.checkpoint.restoration import restore_backup as restore

    with system_errors(directory), ExitStack() as stack:
        is_new = not directory.exists()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        stack.enter_context(locked_directory(directory))
        if is_new:
            stack.callback(remove_unused, directory)
        restored = restore(source, directory, replace=replace)
    if as_json:
        answer = {"directory": str(directory), "replaced": restored.replaced, **backup_summary(restored.manifest)}
        typer.echo(json.dumps(answer, indent=2))
        return
    made = restored.manifest
    typer.echo(f"{directory}: restored {source} of {time_text(made.created_at_ns)}, and verified it: {_contents(made)}")
    if restored.replaced:
        typer.echo(f"  what was there is in {restored.replaced}; remove it when it is not needed any more")
    _report_gaps(made)


def _contents(manifest: BackupManifest) -> str:
    size, count = render.size(manifest.size_bytes), len(manifest.checkpoints)
    checkpoints = f"{count} checkpoints" if manifest.purpose == "backup" else "without checkpoints"
    return f"journal of schema {manifest.schema}, {checkpoints}, {len(manifest.files)} files, {size}"


def _show_progress(checkpoint_id: str) -> None:
    """Names each checkpoint before it is verified, in a terminal: large ones take minutes."""
    if sys.stderr.isatty():
        typer.echo(f"verifying checkpoint {checkpoint_id}", err=True)


def _report_gaps(manifest: BackupManifest) -> None:
    if manifest.purpose == "backup" and not manifest.checkpoints:
        typer.echo("  it has no checkpoint: no run can be continued from it", err=True)
    for checkpoint_id in manifest.left_out:
        typer.echo(f"  checkpoint {checkpoint_id} was damaged and is not in it", err=True)
