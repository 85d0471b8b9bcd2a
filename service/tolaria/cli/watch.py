"""`tolaria watch`: follow a running service until its run is over. Must not know how a status is drawn."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager

import typer
from rich.console import Console

from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState
from tolaria.cli.asking import Target, json_text
from tolaria.cli.client import admin_client
from tolaria.cli.failures import RunFailedError, ServiceUnreachableError
from tolaria.cli.view import Show, live_view
from tolaria.cli.words import one_line
from tolaria.config import Address

_RETRY_S = 0.5
_OVER = {RunState.RUN_STATE_FINISHED, RunState.RUN_STATE_FAILED}


def watch(whom: Target, *, as_json: bool, wait: bool) -> None:
    """Show the service's states until its run has finished; with `wait`, through restarts too.

    Raises:
        ServiceUnreachableError: when the service does not answer or goes away, and `wait` is off.
        RunFailedError: when the run failed.
    """
    with _shown(as_json=as_json) as show:
        last = asyncio.run(_patiently(whom, show) if wait else follow_run(whom.address, whom.timeout_s, show))
    if last.state == RunState.RUN_STATE_FAILED:
        raise RunFailedError(f"the run failed: {one_line(last.state_reason) or 'no reason given'}")


async def follow_run(address: Address, timeout_s: float, show: Show) -> GetStatusResponse:
    """Show every status of the service at `address` until the run is over, and return the last.

    Raises:
        ServiceUnreachableError: when nobody answers, or the service goes away before the run is over.
    """
    async with admin_client(address, timeout_s) as client, aclosing(client.watch()) as statuses:
        async for status in statuses:
            show(status)
            if status.state in _OVER:
                return status
    raise ServiceUnreachableError(f"the service at {address} has gone before its run was over")


async def _patiently(whom: Target, show: Show) -> GetStatusResponse:
    told = ""
    while True:
        try:
            return await follow_run(whom.address, whom.timeout_s, show)
        except ServiceUnreachableError as error:
            if str(error) != told:
                typer.echo(f"waiting: {error}", err=True)
            told = str(error)
        await asyncio.sleep(_RETRY_S)


@contextmanager
def _shown(*, as_json: bool) -> Iterator[Show]:
    if as_json:
        yield lambda status: typer.echo(json_text(status, indent=None))
        return
    with live_view(Console(file=sys.stdout)) as show:
        yield show
