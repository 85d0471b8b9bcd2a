"""`tolaria demo`: runs `tolaria serve` as a child process, follows its run, and reports what the seeds achieved.

Beside it a second service trains the same run without seeds.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, cast

import anyio
import typer
from rich.console import Console

from leyline.v1.admin_service_pb2 import GetStatusResponse, ListIncidentsRequest, RunState
from tolaria.cli import errors, render
from tolaria.cli.admin_commands import DEMO_EPOCHS, TIMEOUT_S
from tolaria.cli.client import Target, admin_stub, connectable, follow_run
from tolaria.cli.report import RunRecord, summary_json, summary_lines
from tolaria.config import Address, Settings, load_settings
from tolaria.processes import ChildCommand, ChildProcess, running

BIND_FAILURE = "cannot listen on"  # part of BindError's message, in the log of a child whose port is taken
LOG_LINES_MAX = 200
LINE_LENGTH_MAX = 64 * 1024
_LOG_LINES_SHOWN = 20
_EXIT_TIMEOUT_S = 2.0
_WRONG_SETTINGS = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

DEMO_SETTINGS: Final[Mapping[str, object]] = {
    # A host that needs its seeds, half of the images for each of two seeds, and a corrupt shard on the way.
    "training.options": {"host": "thumbnail", "learning_rate": 0.1, "seed_sources": 2, "poison_epoch": 40},
    # The host learns at a high rate, so that it soon gains no more; for a seed a tenth of it would be too much.
    "optimizer.seed_factor": 0.05,
    # Boundaries wait for the controller, so that the run and the one without seeds differ in the seeds alone.
    "training.deterministic": True,
    "control.boundary_budget_ms": 500,
    "control.tamiyo_budget_ms": 400,
    # Both runs end at a low learning rate, so that the last accuracy is not chance.
    "optimizer.policy": "cosine",
}
"""Settings of a demo without another job; each can be overridden."""


@dataclass(frozen=True, slots=True)
class Demo:
    """A planned demo. `arguments` are the options of `serve`, which are appended to `program`.

    `compare`: whether the same run without seeds is trained beside it.
    """

    settings: Settings
    arguments: tuple[str, ...]
    stay: bool
    as_json: bool
    compare: bool = False
    program: tuple[str, ...] = (sys.executable, "-m", "tolaria")
    start_timeout_s: float = 120.0  # importing torch from a cold disk takes up to a minute
    stop_margin_s: float = 5.0

    @classmethod
    def plan(
        cls,
        config_file: Path | None,
        overrides: Sequence[str],
        *,
        epochs: int | None,
        stay: bool,
        as_json: bool,
        alone: bool = False,
    ) -> Demo:
        """Checks the settings before anything is started. Raises ConfigurationError if they are invalid."""
        given = [*overrides, *([f"training.epochs={epochs}"] if epochs is not None else [])]
        chosen = load_settings(config_file, given)
        own_job = not {"job", "options"} & chosen.training.model_fields_set
        defaults: dict[str, object] = {**(DEMO_SETTINGS if own_job else {}), "training.epochs": DEMO_EPOCHS}
        for name, value in defaults.items():
            section, _, field = name.partition(".")
            if field not in getattr(chosen, section).model_fields_set:
                given.append(f"{name}={json.dumps(value) if isinstance(value, dict) else value}")
        settings = load_settings(config_file, given)
        # The demo reads the child's addresses from its log, and decides when the child exits.
        required = ["logging.format=json", "service.exit_when_done=false"]
        if settings.logging.level not in {"debug", "info"}:
            required.append("logging.level=info")
        config = ["--config", str(config_file)] if config_file else []
        return cls(settings, (*config, *_as_options([*given, *required])), stay, as_json, own_job and not alone)

    def run(self) -> None:
        """Runs the demo; its state is temporary unless state.dir is set. Raises CommandFailedError, SignalledError."""
        with tempfile.TemporaryDirectory(prefix="tolaria-demo-") as temporary:
            arguments = self.arguments
            if "dir" not in self.settings.state.model_fields_set:
                arguments = (*arguments, *_as_options([f"state.dir={temporary}/run"]))
            asyncio.run(self._run(arguments, Path(temporary) / "without-seeds"))

    async def _run(self, arguments: tuple[str, ...], beside_dir: Path) -> None:
        with interrupts() as signals:
            try:
                await self._attempt(arguments, beside_dir, signals)
            except errors.PortTakenError as error:
                free_ports = self._free_ports()
                if not free_ports:
                    raise
                self._print(f"{render.one_line(str(error).splitlines()[0])}; starting again on free ports")
                await self._attempt((*arguments, *_as_options(free_ports)), beside_dir, signals)

    async def _attempt(self, arguments: tuple[str, ...], beside_dir: Path, signals: Interrupts) -> None:
        started_s = time.monotonic()
        self._print("starting a service; it takes a few seconds")
        command = (*self.program, "serve", "--while-stdin", *arguments)
        stop_timeout_s = self.settings.service.drain_timeout_s + self.stop_margin_s
        async with AsyncExitStack() as stack:
            child = await stack.enter_async_context(serve_child(command, stop_timeout_s=stop_timeout_s))
            addresses = await self._addresses(child)
            run, other = RunRecord(), RunRecord() if self.compare else None
            async with AsyncExitStack() as beside:
                if other is not None:
                    without = RunWithoutSeeds(self, arguments, beside_dir, other)
                    await beside.enter_async_context(running(without.follow))
                await self._follow(child, addresses, run, other)
                if other is not None:
                    await without.over.wait()
            wall_s = time.monotonic() - started_s
            for line in summary_lines(run, other, wall_s):
                self._print(line)
            if self.as_json:
                typer.echo(summary_json(run, other, wall_s))
            if not self.stay:
                self._print("the service ends now; --stay keeps it running")
                return
            self._print(f"metrics  http://{addresses.metrics}/metrics")
            self._print(f"status   tolaria status --address {addresses.grpc}")
            self._print(f"watch    tolaria watch --address {addresses.grpc}")
            self._print("still serving; Ctrl-C ends it")
            signals.expected = True
            await child.wait()
            raise child.failure(f"the service ended: exit code {child.returncode}")

    async def _addresses(self, child: ServeChild) -> ServiceAddresses:
        try:
            addresses = await child.addresses(self.start_timeout_s)
        except TimeoutError:
            raise child.failure(f"the service did not start within {self.start_timeout_s:g} s") from None
        if addresses is not None:
            return addresses
        if any(BIND_FAILURE in line for line in child.log_lines):
            raise child.failure("the service could not start: an address is in use", errors.PortTakenError)
        kind = errors.StartRefusedError if child.returncode == _WRONG_SETTINGS else errors.CommandFailedError
        raise child.failure(f"the service could not start: exit code {child.returncode}", kind)

    async def _follow(
        self, child: ServeChild, addresses: ServiceAddresses, run: RunRecord, other: RunRecord | None
    ) -> None:
        target = Target(connectable(addresses.grpc), TIMEOUT_S)

        def curves() -> list[str]:
            return run.curves.lines(other.curves if other else None)

        try:
            with render.live_view(Console(file=sys.stderr if self.as_json else sys.stdout), curves) as show:

                def update(status: GetStatusResponse) -> None:
                    run.update(status)
                    show(status)

                last = await follow_run(target, update)
            async with admin_stub(target) as stub:
                answer = await stub.ListIncidents(ListIncidentsRequest(), timeout=TIMEOUT_S)
                run.incidents = tuple(answer.incidents)
        except errors.ServiceUnreachableError as error:
            # The connection is lost a moment before the process exits.
            with anyio.move_on_after(_EXIT_TIMEOUT_S):
                await child.wait()
                raise child.failure(f"the service ended during its run: exit code {child.returncode}") from None
            raise child.failure(f"the service does not answer: {error}") from None
        if last.state == RunState.RUN_STATE_FAILED:
            raise child.failure(f"the run failed: {render.one_line(last.state_reason) or 'no reason given'}")

    def _print(self, line: str) -> None:
        typer.echo(line, err=self.as_json)

    def _free_ports(self) -> list[str]:
        """Returns overrides that choose a free port for each listening address left at its default."""
        used, default = self.settings, Settings()
        addresses = [
            ("server.listen", used.server.listen, default.server.listen),
            ("metrics.listen", used.metrics.listen, default.metrics.listen),
        ]
        return [f"{name}={Address(Address.parse(a).host, 0)}" for name, a, standard in addresses if a == standard]


class RunWithoutSeeds:
    """The same run in a second service, on free ports, with its state in another directory."""

    def __init__(self, demo: Demo, arguments: Sequence[str], state_dir: Path, record: RunRecord) -> None:
        self._demo, self._arguments, self._record = demo, tuple(arguments), record
        self._state_dir = state_dir
        self.over = anyio.Event()

    async def follow(self) -> None:
        """A task: records the run until it is over; a failure is recorded and does not end the demo."""
        try:
            await self._follow()
        except (errors.CommandFailedError, TimeoutError) as error:
            self._record.failure = str(error).splitlines()[0] or "it did not start in time"
        finally:
            self.over.set()

    async def _follow(self) -> None:
        own = ["seeds.enabled=false", "server.listen=127.0.0.1:0", "metrics.listen=127.0.0.1:0", "signals.path="]
        options = _as_options([*own, f"state.dir={self._state_dir}"])
        command = (*self._demo.program, "serve", "--while-stdin", *self._arguments, *options)
        stop_timeout_s = self._demo.settings.service.drain_timeout_s + self._demo.stop_margin_s
        async with serve_child(command, stop_timeout_s=stop_timeout_s) as child:
            addresses = await child.addresses(self._demo.start_timeout_s)
            if addresses is None:
                raise child.failure(f"exit code {child.returncode}")
            target = Target(connectable(addresses.grpc), TIMEOUT_S)
            last = await follow_run(target, self._record.update)
            if last.state == RunState.RUN_STATE_FAILED:
                self._record.failure = last.state_reason


def _as_options(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


@dataclass(slots=True)
class Interrupts:
    """The latest signal received, and whether the first one is an ordinary end."""

    received: int | None = None
    expected: bool = False


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Cancels the current task on SIGINT or SIGTERM; a second signal cancels its cleanup.

    Raises:
        SignalledError: after the cleanup, unless one signal came and was expected.
    """
    loop, task = asyncio.get_running_loop(), cast("asyncio.Task[object]", asyncio.current_task())
    signals = Interrupts()

    def cancel(number: int) -> None:
        signals.expected &= signals.received is None
        signals.received = number
        task.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, cancel, number)
    try:
        yield signals
    except asyncio.CancelledError:
        if signals.received is None:
            raise
        task.uncancel()
        if not signals.expected:
            raise errors.SignalledError(signals.received) from None
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


@dataclass(frozen=True, slots=True)
class ServiceAddresses:
    """The addresses that a service has logged."""

    grpc: Address
    metrics: Address

    @classmethod
    def from_log(cls, line: str) -> ServiceAddresses | None:
        """Parses the log event `serving`; returns None for any other line."""
        try:
            entry = json.loads(line)
            if entry["event"] == "serving":
                return cls(Address.parse(entry["grpc"]), Address.parse(entry["metrics"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        return None


class ServeChild:
    """A `tolaria serve` child process: the last lines of its log, the addresses that it has logged, and its exit code.

    Attributes:
        log_lines: at most LOG_LINES_MAX lines of standard error, the oldest first.
        returncode: None until `wait` returns.
    """

    def __init__(self) -> None:
        self.returncode: int | None = None
        self.log_lines: deque[str] = deque(maxlen=LOG_LINES_MAX)
        self._unfinished = ""
        self._addresses: ServiceAddresses | None = None
        self._serving_or_ended, self._ended = anyio.Event(), anyio.Event()

    def failure(
        self, what: str, kind: type[errors.CommandFailedError] = errors.CommandFailedError
    ) -> errors.CommandFailedError:
        """Returns an error whose message ends with the last lines of the log."""
        shown = "".join(f"\n  {line}" for line in [*self.log_lines][-_LOG_LINES_SHOWN:])
        return kind(f"{what}\nlast lines of its log:{shown}" if shown else what)

    async def addresses(self, timeout_s: float) -> ServiceAddresses | None:
        """Waits until the service listens; returns None if it exits instead. Raises TimeoutError."""
        with anyio.fail_after(timeout_s):
            await self._serving_or_ended.wait()
        return self._addresses

    async def wait(self) -> None:
        """Waits until it has exited and its log has been read."""
        await self._ended.wait()

    async def watch(self, child: ChildProcess) -> None:
        """A task: reads the log until the process has exited."""
        await child.ended()
        self.returncode = child.process.returncode
        if self._unfinished:
            self._keep(self._unfinished)
        self._ended.set()
        self._serving_or_ended.set()

    def read(self, text: str) -> None:
        """Splits output into lines of bounded length."""
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        if len(self._unfinished) > LINE_LENGTH_MAX:
            lines, self._unfinished = [*lines, self._unfinished], ""
        for line in lines:
            self._keep(line)

    def _keep(self, line: str) -> None:
        self.log_lines.append(line[:LINE_LENGTH_MAX])
        if self._addresses is None and (addresses := ServiceAddresses.from_log(line)):
            self._addresses = addresses
            self._serving_or_ended.set()


@asynccontextmanager
async def serve_child(command: Sequence[str], *, stop_timeout_s: float) -> AsyncIterator[ServeChild]:
    """Runs `command` until the block ends, then ends its standard input, and kills it after `stop_timeout_s`.

    Its standard input also ends when this process dies.
    """
    child = ServeChild()
    process = await ChildProcess.spawn(ChildCommand("the service", command, keep_stderr=True), child.read)
    async with running(partial(child.watch, process)):
        try:
            yield child
        finally:
            await process.close(stop_timeout_s)
