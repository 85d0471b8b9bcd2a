"""`tolaria demo`: a service of its own, followed until its run is over, summed up, and ended.

Must not know how a process is kept (`child`), how a status is drawn (`view`) or worded (`words`, `summary`).
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import typer
from rich.console import Console

from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState
from tolaria.cli.child import ServeChild, Serving, serve_child
from tolaria.cli.client import connectable
from tolaria.cli.failures import (
    DemoFailedError,
    PortTakenError,
    ServiceUnreachableError,
    StartRefusedError,
)
from tolaria.cli.interrupts import Interrupts, interrupts
from tolaria.cli.options import DEMO_EPOCHS, TIMEOUT_S
from tolaria.cli.stories import Stories
from tolaria.cli.summary import summary_json, summary_lines, where_next
from tolaria.cli.view import live_view
from tolaria.cli.watch import follow_run
from tolaria.cli.words import one_line
from tolaria.config import Address, MetricsSettings, ServerSettings, Settings, load_settings

SERVE = (sys.executable, "-m", "tolaria")
# Part of BindError's message, which is how a child without any other word for it tells that a port is taken.
BIND_FAILURE = "cannot listen on"
_START_TIMEOUT_S = 120.0  # a cold disk reads torch for a minute
_STOP_MARGIN_S = 5.0
_DYING_S = 2.0
_WRONG_SETTINGS = 2


@dataclass(frozen=True, slots=True)
class Demo:
    """What to run, and how to tell of it. `program` is what `serve` and its options are appended to."""

    settings: Settings
    arguments: tuple[str, ...]
    stay: bool
    as_json: bool
    program: tuple[str, ...] = SERVE

    def say(self, line: str) -> None:
        """Tell people something: on stdout, which belongs to the JSON object alone when that was asked for."""
        typer.echo(line, err=self.as_json)


def planned(
    config_file: Path | None, overrides: Sequence[str], *, epochs: int | None, stay: bool, as_json: bool
) -> Demo:
    """Check the settings here, before anything is started, and pass them on.

    Raises:
        ConfigurationError: when they cannot be used.
    """
    asked = [*overrides, *([f"training.epochs={epochs}"] if epochs is not None else [])]
    settings = load_settings(config_file, asked)
    if "epochs" not in settings.training.model_fields_set:
        asked.append(f"training.epochs={DEMO_EPOCHS}")
        settings = load_settings(config_file, asked)
    # The log is how the child tells its addresses, and only this process says when it may end.
    needed = ["logging.format=json", "service.exit_when_done=false"]
    if settings.logging.level not in {"debug", "info"}:
        needed.append("logging.level=info")
    config = ["--config", str(config_file)] if config_file else []
    return Demo(settings, (*config, *_as_options([*asked, *needed])), stay, as_json)


def run(demo: Demo) -> None:
    """Run it from start to end.

    Raises:
        DemoFailedError: when the service or its run failed.
        SignalledError: when a signal ended it early.
    """
    with _place_of_its_own(demo.settings) as place:
        asyncio.run(run_demo(replace(demo, arguments=(*demo.arguments, *_as_options(place)))))


async def run_demo(demo: Demo) -> None:
    """The same inside an event loop, in its main thread."""
    with interrupts() as signals:
        try:
            await _attempt(demo, demo.arguments, signals)
        except PortTakenError as error:
            free_ports = _free_ports(demo.settings)
            if not free_ports:
                raise
            demo.say(f"{one_line(str(error).partition(chr(10))[0])}; starting again on free ports")
            await _attempt(demo, (*demo.arguments, *_as_options(free_ports)), signals)


@contextmanager
def _place_of_its_own(settings: Settings) -> Iterator[list[str]]:
    """Overrides that keep a demo's state apart from every other run's, unless somebody has said where it goes."""
    if "dir" in settings.state.model_fields_set:
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="tolaria-demo-") as place:
        yield [f"state.dir={place}"]


async def _attempt(demo: Demo, arguments: tuple[str, ...], signals: Interrupts) -> None:
    command = (*demo.program, "serve", "--while-stdin", *arguments)
    stop_timeout_s = demo.settings.service.drain_timeout_s + _STOP_MARGIN_S
    started = time.monotonic()
    demo.say("starting a service; it takes a few seconds")
    async with serve_child(command, stop_timeout_s=stop_timeout_s) as child:
        serving = await _serving(child)
        stories = Stories()
        last = await _followed(demo, child, serving, stories)
        _report(demo, last, stories, time.monotonic() - started)
        for line in where_next(serving, stay=demo.stay):
            demo.say(line)
        if demo.stay:
            with signals.as_end_of_wait():
                await child.ended()
                raise DemoFailedError(f"the service ended by itself with exit code {child.returncode}", child.log_lines)


async def _serving(child: ServeChild) -> Serving:
    try:
        serving = await child.serving(_START_TIMEOUT_S)
    except TimeoutError:
        raise DemoFailedError(f"the service did not start within {_START_TIMEOUT_S:g} s", child.log_lines) from None
    if serving is None:
        await child.ended()
        raise _start_failure(child)
    return serving


def _start_failure(child: ServeChild) -> DemoFailedError:
    lines = child.log_lines
    taken = [line for line in lines if BIND_FAILURE in line]
    if taken:
        return PortTakenError("the service could not start: an address is in use", lines)
    what = f"the service could not start: exit code {child.returncode}"
    return StartRefusedError(what, lines) if child.returncode == _WRONG_SETTINGS else DemoFailedError(what, lines)


async def _followed(demo: Demo, child: ServeChild, serving: Serving, stories: Stories) -> GetStatusResponse:
    console = Console(file=sys.stderr if demo.as_json else sys.stdout)
    try:
        with live_view(console) as show:

            def see(status: GetStatusResponse) -> None:
                stories.see(status)
                show(status)

            last = await follow_run(connectable(serving.grpc), TIMEOUT_S, see)
    except ServiceUnreachableError as error:
        raise await _lost(child, error) from None
    if last.state == RunState.RUN_STATE_FAILED:
        reason = one_line(last.state_reason) or "no reason given"
        raise DemoFailedError(f"the run failed: {reason}", child.log_lines)
    return last


async def _lost(child: ServeChild, error: ServiceUnreachableError) -> DemoFailedError:
    """Its connection ends a moment before the process does: wait for the last words."""
    try:
        async with asyncio.timeout(_DYING_S):
            await child.ended()
    except TimeoutError:
        return DemoFailedError(f"the service does not answer: {error}", child.log_lines)
    return DemoFailedError(f"the service ended during its run with exit code {child.returncode}", child.log_lines)


def _report(demo: Demo, last: GetStatusResponse, stories: Stories, wall_seconds: float) -> None:
    for line in summary_lines(last, stories, wall_seconds):
        demo.say(line)
    if demo.as_json:
        typer.echo(summary_json(last, stories, wall_seconds))


def _free_ports(settings: Settings) -> list[str]:
    """Overrides that let the system choose ports, for the addresses that nobody chose."""
    default = {
        "server.listen": (settings.server.listen, ServerSettings().listen),
        "metrics.listen": (settings.metrics.listen, MetricsSettings().listen),
    }
    return [
        f"{name}={Address(Address.parse(listen).host, 0)}"
        for name, (listen, unchosen) in default.items()
        if listen == unchosen
    ]


def _as_options(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]
