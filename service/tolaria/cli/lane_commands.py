"""`tolaria lane`: this machine as a part of a group whose service runs elsewhere."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, so that --help is quick
from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tolaria.cli.admin_commands import ConfigFile, Overrides
from tolaria.cli.errors import CommandFailedError, ServiceUnreachableError, SignalledError, StartRefusedError
from tolaria.errors import ConfigurationError, JoinRefusedError, LaneFailedError, ServiceAbsentError

if TYPE_CHECKING:
    from tolaria.ranks.node import Node

_FULL_FACTOR = 1.5

lane_app = typer.Typer(help="Train on this machine for a service elsewhere.", no_args_is_help=True)


@lane_app.callback()
def _root() -> None:
    pass


@lane_app.command()
def join(
    *,
    rendezvous: Annotated[
        str | None,
        typer.Option(
            "--rendezvous",
            metavar="HOST:PORT",
            help="Where the service waits (default: lane.rendezvous of the settings).",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, max=256, help="Ranks on this machine (default: lane.processes)."),
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option("--secret-file", metavar="FILE", help="File with the group's secret (default: lane.secret_file)."),
    ] = None,
    wait_s: Annotated[
        float | None,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            min=0,
            help="Give up after so long without a service, or with a full group "
            "(default: never, and 1.5 times lane.node_timeout_s).",
        ),
    ] = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Train on this machine as a part of the group of a service elsewhere, until its run is over.

    Needs the same versions of Tolaria and torch as the service, a copy of the job's code, and the group's secret.
    Waits for the service, and joins again when the group or the service starts again. Exit codes: 0 the run is over;
    1 it has failed, or the group stays full; 2 refused for another secret, version or job; 3 no service within --wait.
    """
    import anyio

    from tolaria.config import Address, load_settings
    from tolaria.config.ranks import read_secret
    from tolaria.ranks.node import Node
    from tolaria.ranks.output import OutputThread

    lane = load_settings(config_file, overrides or []).lane
    try:
        address = Address.parse(rendezvous or lane.rendezvous)
    except ValueError as error:
        raise ConfigurationError([f"--rendezvous: {error}"]) from None
    file = str(secret_file or lane.secret_file)
    if not file:
        raise ConfigurationError(["--secret-file, or lane.secret_file, is needed to join a group"])
    secret = read_secret(file)
    with OutputThread(1) as stdout, OutputThread(2) as stderr:
        node = Node(
            address,
            secret,
            processes or lane.processes,
            wait_s=math.inf if wait_s is None else wait_s,
            full_s=_FULL_FACTOR * lane.node_timeout_s if wait_s is None else wait_s,
            say=stdout.line,
            write=stderr.write,
        )
        anyio.run(_take_part, node)


async def _take_part(node: Node) -> None:
    """Runs until the run is over, or a signal arrives; then no rank is left."""
    import anyio

    received: list[signal.Signals] = []

    async def end_on_signal(scope: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                received.append(number)
                scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(end_on_signal, tasks.cancel_scope)
        try:
            await node.run()
        except JoinRefusedError as error:
            raise (CommandFailedError if error.reason == "full" else StartRefusedError)(str(error)) from None
        except ServiceAbsentError as error:
            raise ServiceUnreachableError(str(error)) from None
        except LaneFailedError as error:
            raise CommandFailedError(str(error)) from None
        tasks.cancel_scope.cancel()
    if received:
        raise SignalledError(received[0])
