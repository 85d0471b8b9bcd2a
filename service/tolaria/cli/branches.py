"""`tolaria branch`: a new run that goes on from a restore point of another one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tolaria.cli.admin_commands import ConfigFile, Overrides
from tolaria.cli.errors import CommandFailedError
from tolaria.cli.exports import state_directory

branch_app = typer.Typer()


@branch_app.command()
def branch(
    *,
    point: Annotated[
        str, typer.Option("--from", metavar="ID|best|newest", help="Checkpoint of restore-points to go on from.")
    ] = "newest",
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="State directory to make; one that exists is refused.")
    ],
    state_dir: Annotated[
        Path | None, typer.Option("--state-dir", metavar="DIR", help="That of the other run (default: state.dir).")
    ] = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the branch as JSON.")] = False,
) -> None:
    """Begin a new run from a checkpoint of another one, which stays as it is, also while its service runs.

    tolaria serve with state.dir set to DIR trains it. tolaria checkpoint makes a checkpoint of the present state first.
    """
    directory = state_directory(state_dir, config_file, overrides)
    from tolaria.run.branches import make_branch  # noqa: PLC0415 - not needed for --help

    try:
        made = make_branch(directory, point, to)
    except OSError as error:
        raise CommandFailedError(f"{directory} cannot be read: {error.strerror or error}") from None
    origin = made.origin
    if as_json:
        typer.echo(json.dumps({"run_id": made.run_id, "directory": str(made.directory), "origin": asdict(origin)}))
        return
    typer.echo(f"run {made.run_id} in {made.directory} begins at step {origin.global_step} of run {origin.run_id}")
    typer.echo(f"  checkpoint {origin.checkpoint_id}, digest {origin.digest}")
    typer.echo(f"  tolaria serve --set state.dir={made.directory} trains it, with the settings of the other run;")
    typer.echo("  while that run's service lasts, also with other addresses (server.listen, metrics.listen)")
