"""The grammar of the `tolaria` command: its options, its help. Must not know how anything is done."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs: `--help` answers in a moment, `status` never waits
# for what only `serve` needs, and nothing but `serve` ever sees torch.
from __future__ import annotations

import platform
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tolaria import __version__
from tolaria.cli.changes import changes
from tolaria.cli.edge import Told
from tolaria.cli.emergency import emergency_app
from tolaria.cli.history import history
from tolaria.cli.options import (
    DEMO_EPOCHS,
    TIMEOUT_S,
    AsJson,
    ConfigFile,
    Overrides,
    ServiceAddress,
    Timeout,
    WhileStdin,
)
from tolaria.cli.signals import signals_app

app = typer.Typer(
    cls=Told,
    name="tolaria",
    help="Trains a PyTorch model unattended while seeds are grafted into it; asks or steers a service that does.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Check or show the settings in force.", no_args_is_help=True)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tolaria {__version__} (Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(*, config_file: ConfigFile = None, overrides: Overrides = None, while_stdin: WhileStdin = False) -> None:
    """Train, graft the seeds that the peers ask for, serve operators, until told to stop (SIGTERM or Ctrl-C drains)."""
    from tolaria.cli.serve import serve as run

    raise typer.Exit(run(config_file, overrides or [], while_stdin=while_stdin))


@app.command()
def demo(
    *,
    stay: Annotated[bool, typer.Option("--stay", help="Keep serving after the run, until Ctrl-C.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one JSON object on stdout; all else goes to stderr.")
    ] = False,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help=f"Epochs to train (default: training.epochs where it is set, else {DEMO_EPOCHS})."),
    ] = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Train the built-in digits job in a service of its own, with a live view; tell what each grafted seed brought."""
    from tolaria.cli.demo import planned, run

    run(planned(config_file, overrides or [], epochs=epochs, stay=stay, as_json=as_json))


@app.command()
def status(
    *,
    address: ServiceAddress = None,
    timeout_s: Timeout = TIMEOUT_S,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show what a running service does now."""
    from tolaria.cli import asking

    asking.status(asking.target(address, timeout_s, config_file, overrides or []), as_json=as_json)


@app.command()
def watch(
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a service that is not there (yet, or again).")] = False,
    address: ServiceAddress = None,
    timeout_s: Timeout = TIMEOUT_S,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each status as one line of JSON.")] = False,
) -> None:
    """Follow a running service until its run is over."""
    from tolaria.cli import asking
    from tolaria.cli.watch import watch as follow

    follow(asking.target(address, timeout_s, config_file, overrides or []), as_json=as_json, wait=wait)


class PeerName(StrEnum):
    """The peers that have a reference."""

    TAMIYO = "tamiyo"
    KASMINA = "kasmina"


@app.command()
def peer(
    name: Annotated[PeerName, typer.Argument(help="The controller (tamiyo) or the executor (kasmina).")],
    *,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to serve; port 0: any free one.")],
    board: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The service's signal board, to acknowledge emergencies on.")
    ] = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    while_stdin: WhileStdin = False,
) -> None:
    """Serve a reference peer; its address is one line of JSON on stdout."""
    from tolaria.cli.peer import peer as run

    run(
        "tamiyo" if name is PeerName.TAMIYO else "kasmina",
        listen,
        config_file,
        overrides or [],
        board=board,
        while_stdin=while_stdin,
    )


@config_app.command()
def check(*, config_file: ConfigFile = None, overrides: Overrides = None) -> None:
    """Say whether the settings can be used; if not, every problem, and exit code 2."""
    from tolaria.cli import config

    config.check(config_file, overrides or [])


@config_app.command()
def show(*, config_file: ConfigFile = None, overrides: Overrides = None) -> None:
    """Print the settings in force as TOML, with what each means; secrets are masked."""
    from tolaria.cli import config

    config.show(config_file, overrides or [])


app.add_typer(changes)
app.add_typer(history)
app.add_typer(emergency_app, name="emergency")
app.add_typer(signals_app, name="signals")
app.add_typer(config_app, name="config")
