"""`tolaria restore-points | incidents | verify`: what is kept to go back to, and what has happened.

Must not know how a call is made, nor how a checkpoint is read.
"""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, as in `app`
from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from leyline.v1.admin_service_pb2 import (
    ListIncidentsRequest,
    ListIncidentsResponse,
    ListRestorePointsRequest,
    ListRestorePointsResponse,
)
from tolaria.cli.options import TIMEOUT_S, AsJson, ConfigFile, Overrides, ServiceAddress, Timeout

history = typer.Typer()

_UINT32_MAX = 2**32 - 1


@history.command()
def restore_points(
    *,
    address: ServiceAddress = None,
    timeout_s: Timeout = TIMEOUT_S,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """List what the run can be rolled back to, in memory and on disk."""
    from rich.console import Console

    from tolaria.cli import asking, points
    from tolaria.cli.view import print_table

    def show(answer: ListRestorePointsResponse) -> None:
        if not answer.restore_points:
            typer.echo("there is no restore point yet")
            return
        rows = points.restore_point_rows(answer.restore_points, now_s=time.time())
        print_table(Console(file=sys.stdout), points.RESTORE_POINT_COLUMNS, rows)

    whom = asking.target(address, timeout_s, config_file, overrides or [])
    asking.ask(whom, lambda admin: admin.ListRestorePoints, ListRestorePointsRequest(), as_json=as_json, show=show)


@history.command()
def incidents(
    *,
    limit: Annotated[
        int, typer.Option(min=0, max=_UINT32_MAX, help="The newest so many (default: as many as the service tells).")
    ] = 0,
    address: ServiceAddress = None,
    timeout_s: Timeout = TIMEOUT_S,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """List rollbacks, emergencies and faults of storage, newest first."""
    from rich.console import Console

    from tolaria.cli import asking, points
    from tolaria.cli.view import print_table

    def show(answer: ListIncidentsResponse) -> None:
        if not answer.incidents:
            typer.echo("there is no incident")
            return
        rows = points.incident_rows(answer.incidents)
        print_table(Console(file=sys.stdout), points.INCIDENT_COLUMNS, rows)

    whom = asking.target(address, timeout_s, config_file, overrides or [])
    asking.ask(whom, lambda admin: admin.ListIncidents, ListIncidentsRequest(limit=limit), as_json=as_json, show=show)


@history.command()
def verify(
    *,
    state_dir: Annotated[
        Path | None, typer.Option("--state-dir", metavar="DIR", help="What to look at (default: state.dir).")
    ] = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Re-read every committed checkpoint and the journal, check every digest, change nothing; no service is needed."""
    from tolaria.cli.verify import verify as run

    run(state_dir, config_file, overrides or [])
