"""The `tolaria` command group, and the commands that run something here or read local files."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, so that --help is quick and only serve loads torch
from __future__ import annotations

import gc
import json
import os
import platform
import signal
import sys
import threading
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup

from leyline.v1.admin_service_pb2 import RunState
from tolaria import __version__
from tolaria.cli import render
from tolaria.cli.admin_commands import (
    CHAOS_EPOCHS,
    DEMO_EPOCHS,
    RANKS_MAX,
    TIMEOUT_S,
    ConfigFile,
    Overrides,
    Profile,
    ServiceAddress,
    Timeout,
    admin_app,
)
from tolaria.cli.audit import audit
from tolaria.cli.backups import backup, restore_backup
from tolaria.cli.board import board_app
from tolaria.cli.branches import branch_app
from tolaria.cli.config_commands import config_app
from tolaria.cli.credentials import certs_app, token_app
from tolaria.cli.errors import CommandFailedError, early_signals, failures_in, report
from tolaria.cli.exports import export_app
from tolaria.cli.job_commands import job_app
from tolaria.cli.lane_commands import lane_app
from tolaria.cli.runs import runs_app
from tolaria.cli.skip import skip_app
from tolaria.cli.state_commands import state_app
from tolaria.cli.telemetry import telemetry_app
from tolaria.errors import ConfigurationError, TolariaError

if TYPE_CHECKING:
    from tolaria.config import Settings

WhileStdin = Annotated[bool, typer.Option("--while-stdin", help="Exit when standard input is closed.")]


class CommandGroup(TyperGroup):
    """A group of commands that reports each TolariaError on standard error and exits with its code."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override] # typer passes its own kind of context
        """Invokes the command. Any exception that is not a TolariaError keeps its traceback."""
        from tolaria.config import quieten_grpc  # here: the help of all commands needs no settings, a slow import

        quieten_grpc()
        try:
            result = super().invoke(ctx)
            # A full disk is reported here; the interpreter's flush at exit could not report it.
            if sys.stdout is not None:
                sys.stdout.flush()
        except (TolariaError, BaseExceptionGroup) as error:
            if early_signals.received is None:
                raise typer.Exit(report(failures_in(error))) from None
        except KeyboardInterrupt:
            pass
        else:
            return result
        raise typer.Exit(early_signals.exit_code)


app = typer.Typer(
    cls=CommandGroup,
    name="tolaria",
    help="Train a PyTorch model unattended while seeds are grafted into it; query or control a running service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"tolaria {__version__} (Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _settings(config_file: Path | None, overrides: list[str] | None) -> Settings:
    from tolaria.config import load_settings

    return load_settings(config_file, overrides or [])


@app.command()
def serve(
    *,
    run_name: Annotated[str, typer.Option("--run-name", metavar="NAME", help="Sets training.run_name.")] = "",
    tags: Annotated[
        list[str] | None, typer.Option("--tag", metavar="NAME=VALUE", help="Adds to training.tags.")
    ] = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    while_stdin: WhileStdin = False,
) -> None:
    """Run the service: train, graft seeds, answer operators. SIGTERM or Ctrl-C drains and stops it."""
    named = [f"training.run_name={run_name}"] if run_name else []
    from tolaria.config import SettingsSources

    sources = SettingsSources.of(config_file, [*(overrides or []), *named, *map(_tag, tags or [])])
    settings = sources.read()
    if while_stdin:
        threading.Thread(target=_terminate_at_end_of_stdin, name="stdin", daemon=True).start()
    from tolaria.service import run  # after the settings: wrong ones are reported before this slow import

    raise typer.Exit(run(settings, sources.read))


def _tag(text: str) -> str:
    """Returns the setting of a tag, whose value is text, also where it looks like a number."""
    name, separator, value = text.partition("=")
    if not separator or not name.strip() or "." in name:
        raise typer.BadParameter(f"--tag {text!r} is not NAME=VALUE")
    return f"training.tags.{name.strip()}={json.dumps(value)}"


def _terminate_at_end_of_stdin() -> None:
    try:
        while os.read(0, 4096):
            pass
    except OSError:
        pass  # a standard input that was never open has ended
    os.kill(os.getpid(), signal.SIGTERM)


@app.command()
def demo(
    *,
    stay: Annotated[bool, typer.Option("--stay", help="Keep serving after the run, until Ctrl-C.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to stdout at the end, everything else to stderr.")
    ] = False,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Epochs to train (default: training.epochs if it is set, "
            f"else {DEMO_EPOCHS}, {CHAOS_EPOCHS} with chaos).",
        ),
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Do not train the same run without seeds beside it, for comparison.")
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, max=RANKS_MAX, help="Train on this many ranks of one group, on the CPU (default: one process)."
        ),
    ] = None,
    chaos: Annotated[
        bool,
        typer.Option(
            "--chaos",
            help="Kill and stop processes that train, beside the same run undisturbed; show that nothing is lost.",
        ),
    ] = False,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Train handwritten digits with a live view: a host that needs its seeds, beside the same run without them.

    Shows merged gradients, a corrupt shard that is skipped or rolled back, curves, and what each seed achieved.
    Another training.job or training.options is trained as it is, without a comparison.

    With --chaos a few processes of the lane get SIGKILL, SIGSEGV or SIGSTOP, by turns in an order that
    training.seed decides. At the end the final state is compared bit by bit with that of the undisturbed run, and
    the time of each recovery is shown; the exit code is 1 if anything was lost.
    """
    from tolaria.cli.demo import Demo

    plan = partial(Demo.plan, epochs=epochs, stay=stay, as_json=as_json, alone=alone, ranks=ranks, chaos=chaos)
    plan(config_file, overrides or []).run()


@app.command()
def watch(
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Wait while no service answers, at first or later.")] = False,
    address: ServiceAddress = None,
    profile: Profile = None,
    timeout_s: Timeout = TIMEOUT_S,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each status as one line of JSON.")] = False,
) -> None:
    """Follow a running service until its run is over."""
    import asyncio

    from tolaria.cli import client

    target = client.target(address, timeout_s, config_file, overrides, profile)
    follow = client.follow_run_across_restarts if wait else client.follow_run
    if as_json:
        last = asyncio.run(follow(target, lambda status: typer.echo(render.json_text(status, indent=None))))
    else:
        with render.live_view(Console(file=sys.stdout)) as show:
            last = asyncio.run(follow(target, show))
    if last.state == RunState.RUN_STATE_FAILED:
        raise CommandFailedError(f"the run failed: {render.one_line(last.state_reason) or 'no reason given'}")


class PeerName(StrEnum):
    """The reference peers."""

    TAMIYO = "tamiyo"
    KASMINA = "kasmina"


@app.command()
def peer(
    name: Annotated[PeerName, typer.Argument(help="The controller (tamiyo) or the executor (kasmina).")],
    *,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Address to serve on; port 0: any free one.")],
    board: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Signal board of the service, to acknowledge emergencies on.")
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where Tamiyo keeps its history, for after a restart.")
    ] = None,
    tls_cert: Annotated[str, typer.Option(metavar="FILE", help="Certificate chain of the peer, for TLS.")] = "",
    tls_key: Annotated[str, typer.Option(metavar="FILE", help="Private key of --tls-cert.")] = "",
    tls_client_ca: Annotated[
        str, typer.Option(metavar="FILE", help="CA that Tolaria's certificate must come from (mutual TLS).")
    ] = "",
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    while_stdin: WhileStdin = False,
) -> None:
    """Serve a reference peer; its address is printed as one line of JSON."""
    import anyio

    from tolaria.config import Address
    from tolaria.reference.server import serve_peer
    from tolaria.security.certificates import TlsFiles
    from tolaria.telemetry.logging import LogContext, logging_to
    from tolaria.telemetry.tracing import tracing

    settings = _settings(config_file, overrides)
    try:
        Address.parse(listen)
    except ValueError as error:
        raise ConfigurationError([f"--listen: {error}"]) from None
    if bool(tls_cert) != bool(tls_key) or (tls_client_ca and not tls_cert):
        raise ConfigurationError(["--tls-cert and --tls-key must be given together, also with --tls-client-ca"])

    serve_until_stopped = partial(
        serve_peer,
        *(name.value, listen, settings.leyline),
        announce=lambda address: typer.echo(json.dumps({"listening": str(address)})),
        board=board,
        state_dir=state_dir,
        tls=TlsFiles("the peer", tls_cert, tls_key, tls_client_ca) if tls_cert else None,
        while_stdin=while_stdin,
    )
    # A peer has no metrics that could count lines dropped by its log.
    with (
        logging_to(sys.stderr, settings.logging, LogContext(), on_dropped=lambda _priority: None),
        tracing(settings.telemetry, name.value) as tracer,
    ):
        gc.freeze()  # what has been imported stays until the end, which is quicker without it
        gc.enable()
        anyio.run(partial(serve_until_stopped, tracer=tracer))


@app.command()
def verify(
    *,
    state_dir: Annotated[
        Path | None, typer.Option("--state-dir", metavar="DIR", help="State directory (default: state.dir).")
    ] = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of what was read as JSON.")] = False,
) -> None:
    """Verify the digest of every committed checkpoint and the journal, without a service and without any change."""
    directory = state_dir or Path(_settings(config_file, overrides).state.dir)
    origin, hint = ("--state-dir", "") if state_dir else ("state.dir", "; give --state-dir")
    if not directory.is_dir():
        raise ConfigurationError([f"{origin}: there is no directory {directory}{hint}"])
    # After the check: a wrong directory is reported before this slow import.
    from tolaria.checkpoint.directory import JOURNAL
    from tolaria.checkpoint.inspection import inspect_storage

    if not (directory / JOURNAL).is_file():
        raise ConfigurationError([f"{origin}: {directory} holds no {JOURNAL}: no service has kept its state there"])
    findings = []
    try:
        for finding in inspect_storage(directory):
            findings.append(finding)
            detail = render.one_line(finding.detail, length_max=500)
            if not as_json:
                typer.echo(f"{render.one_line(finding.name)}: {finding.condition}, {detail}")
    except OSError as error:
        raise CommandFailedError(f"{directory} cannot be read: {error.strerror or error}") from None
    if as_json:
        typer.echo(json.dumps([asdict(finding) | {"bad": finding.bad} for finding in findings], indent=2))
    inspected, bad = len(findings), sum(finding.bad for finding in findings)
    if bad:
        consequence = "the next start of the service sets them aside, and resumes from the newest intact checkpoint"
        raise CommandFailedError(f"{bad} of {inspected} are not what was written; {consequence}")


@app.command()
def doctor(
    *,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of findings as JSON.")] = False,
) -> None:
    """Examine this machine: addresses, disk, shared memory, limits, clock, torch, job and peers; what to do about each.

    Exit code 1 if something is in the way of a start, or 2 if the settings are wrong.
    """
    settings = _settings(config_file, overrides)
    from tolaria.cli.doctor import Verdict, examine

    findings = []
    for finding in examine(settings):
        findings.append(finding)
        if not as_json:
            typer.echo(f"{finding.verdict.value:8} {finding.check}: {finding.detail}")
            if finding.advice:
                typer.echo(f"{'':8} -> {finding.advice}")
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    if failed := [finding.check for finding in findings if finding.verdict is Verdict.FAILED]:
        raise CommandFailedError(f"in the way of a start: {', '.join(failed)}")


app.add_typer(admin_app)
app.add_typer(export_app)
app.add_typer(skip_app)
app.add_typer(branch_app)
app.add_typer(job_app)
app.add_typer(telemetry_app)
app.command()(audit)
app.command()(backup)
app.command("restore-backup")(restore_backup)
app.add_typer(board_app, name="signals")
app.add_typer(config_app, name="config")
app.add_typer(certs_app, name="certs")
app.add_typer(token_app, name="token")
app.add_typer(state_app, name="state")
app.add_typer(lane_app, name="lane")
app.add_typer(runs_app, name="runs")
