"""`tolaria audit`: the calls that could change something, from a running service or from a journal on disk."""

# ruff: noqa: PLC0415 - as in `tolaria.cli.commands`: --help imports nothing slow
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from leyline.v1 import admin_service_pb2 as messages
from tolaria.cli import render
from tolaria.cli.admin_commands import (
    TIMEOUT_S,
    AsJson,
    ConfigFile,
    Overrides,
    Profile,
    ServiceAddress,
    Timeout,
)
from tolaria.cli.answers import time_text
from tolaria.errors import ConfigurationError

COLUMNS = ("time (UTC)", "who", "role", "from", "call", "step", "outcome", "why")
_LIMIT_MAX = 2**32 - 1


def audit(
    *,
    limit: Annotated[int, typer.Option(min=0, max=_LIMIT_MAX, help="Newest calls to list (default: 100).")] = 0,
    state_dir: Annotated[
        Path | None,
        typer.Option("--state-dir", metavar="DIR", help="Read the journal of this state directory, without a service."),
    ] = None,
    address: ServiceAddress = None,
    profile: Profile = None,
    timeout_s: Timeout = TIMEOUT_S,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """List the calls that changed something or tried to, newest first: who made them, from where, when and why."""
    if state_dir is not None:
        answer = _read(state_dir, limit)
    else:
        from tolaria.cli import client

        target = client.target(address, timeout_s, config_file, overrides, profile)
        request = messages.ListAdminCallsRequest(limit=limit)
        answer = client.call(target, lambda admin: admin.ListAdminCalls, request)
    if as_json:
        typer.echo(render.json_text(answer))
    elif not answer.calls:
        typer.echo("no call has changed anything")
    else:
        render.print_table(rows(answer.calls), COLUMNS)


def rows(calls: Iterable[messages.AdminCall]) -> list[tuple[str, ...]]:
    """Returns table rows in the given order."""
    return [
        (
            time_text(call.called_at),
            render.one_line(call.caller),
            render.one_line(call.role),
            render.one_line(call.peer) or "-",
            render.one_line(call.method),
            str(call.global_step),
            render.one_line(call.outcome) or "not finished",
            render.one_line(call.reason or call.detail) or "-",
        )
        for call in calls
    ]


def _read(state_dir: Path, limit: int) -> messages.ListAdminCallsResponse:
    """Returns the calls in a journal on disk. Raises ConfigurationError, JournalError."""
    from tolaria.checkpoint.directory import JOURNAL
    from tolaria.journal.reader import read_journal
    from tolaria.journal.rows import AdminCallRow
    from tolaria.rpc.listing import INCIDENTS_DEFAULT, list_admin_calls

    path = state_dir / JOURNAL
    if not path.is_file():
        raise ConfigurationError([f"--state-dir: {state_dir} holds no {JOURNAL}: no service has kept its state there"])
    newest_first = read_journal(path, AdminCallRow)[::-1]
    return list_admin_calls(newest_first[: limit or INCIDENTS_DEFAULT])
