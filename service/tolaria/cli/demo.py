"""`tolaria demo`: runs `tolaria serve` as a child process, follows its run, and reports what each seed achieved."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from leyline.v1 import enums_pb2 as enums
from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState
from tolaria.cli import errors, render
from tolaria.cli.admin_commands import DEMO_EPOCHS, TIMEOUT_S
from tolaria.cli.client import Target, connectable, follow_run
from tolaria.config import Address, MetricsSettings, ServerSettings, Settings, load_settings

BIND_FAILURE = "cannot listen on"  # part of BindError's message, in the log of a child whose port is taken
LOG_LINES_MAX = 200
LINE_BYTES_MAX = 64 * 1024
_KILL_TIMEOUT_S = 5.0
_LOG_TIMEOUT_S = 1.0
_EXIT_TIMEOUT_S = 2.0
_WRONG_SETTINGS = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_BEFORE_BLENDING = {enums.SEED_STAGE_GERMINATED, enums.SEED_STAGE_TRAINING}
_BLENDING = {enums.SEED_STAGE_BLENDING, enums.SEED_STAGE_SHADOWING, enums.SEED_STAGE_PROBATIONARY}
_PART_OF_HOST = {enums.SEED_STAGE_FOSSILIZED, enums.SEED_STAGE_TERMINATED}


@dataclass(frozen=True, slots=True)
class Demo:
    """A planned demo. `arguments` are the options of `serve`, which are appended to `program`."""

    settings: Settings
    arguments: tuple[str, ...]
    stay: bool
    as_json: bool
    program: tuple[str, ...] = (sys.executable, "-m", "tolaria")
    start_timeout_s: float = 120.0  # importing torch from a cold disk takes up to a minute
    stop_margin_s: float = 5.0

    @classmethod
    def plan(
        cls, config_file: Path | None, overrides: Sequence[str], *, epochs: int | None, stay: bool, as_json: bool
    ) -> Demo:
        """Checks the settings before anything is started. Raises ConfigurationError if they are invalid."""
        given = [*overrides, *([f"training.epochs={epochs}"] if epochs is not None else [])]
        if "epochs" not in load_settings(config_file, given).training.model_fields_set:
            given.append(f"training.epochs={DEMO_EPOCHS}")
        settings = load_settings(config_file, given)
        # The demo reads the child's addresses from its log, and decides when the child exits.
        required = ["logging.format=json", "service.exit_when_done=false"]
        if settings.logging.level not in {"debug", "info"}:
            required.append("logging.level=info")
        config = ["--config", str(config_file)] if config_file else []
        return cls(settings, (*config, *_as_options([*given, *required])), stay, as_json)

    def run(self) -> None:
        """Runs the demo; its state is temporary unless state.dir is set. Raises DemoFailedError, SignalledError."""
        if "dir" in self.settings.state.model_fields_set:
            asyncio.run(self._run(self.arguments))
            return
        with tempfile.TemporaryDirectory(prefix="tolaria-demo-") as directory:
            asyncio.run(self._run((*self.arguments, *_as_options([f"state.dir={directory}"]))))

    async def _run(self, arguments: tuple[str, ...]) -> None:
        with interrupts() as signals:
            try:
                await self._attempt(arguments, signals)
            except errors.PortTakenError as error:
                free_ports = self._free_ports()
                if not free_ports:
                    raise
                self._print(f"{render.one_line(str(error).splitlines()[0])}; starting again on free ports")
                await self._attempt((*arguments, *_as_options(free_ports)), signals)

    async def _attempt(self, arguments: tuple[str, ...], signals: Interrupts) -> None:
        command = (*self.program, "serve", "--while-stdin", *arguments)
        started = time.monotonic()
        self._print("starting a service; it takes a few seconds")
        stop_timeout_s = self.settings.service.drain_timeout_s + self.stop_margin_s
        async with serve_child(command, stop_timeout_s=stop_timeout_s) as child:
            addresses = await self._addresses(child)
            seeds = SeedHistory()
            last = await self._follow(child, addresses, seeds)
            wall_s = time.monotonic() - started
            for line in summary_lines(last, seeds, wall_s):
                self._print(line)
            if self.as_json:
                typer.echo(summary_json(last, seeds, wall_s))
            if not self.stay:
                self._print("the service ends now; --stay keeps it up to look around")
                return
            self._print(f"metrics  http://{addresses.metrics}/metrics")
            self._print(f"status   tolaria status --address {addresses.grpc}")
            self._print(f"watch    tolaria watch --address {addresses.grpc}")
            self._print("still serving; Ctrl-C ends it")
            with signals.end_wait():
                await child.wait()
                what = f"the service ended by itself with exit code {child.returncode}"
                raise errors.DemoFailedError(what, child.log_lines)

    async def _addresses(self, child: ServeChild) -> ServiceAddresses:
        try:
            addresses = await child.addresses(self.start_timeout_s)
        except TimeoutError:
            what = f"the service did not start within {self.start_timeout_s:g} s"
            raise errors.DemoFailedError(what, child.log_lines) from None
        if addresses is not None:
            return addresses
        await child.wait()
        if any(BIND_FAILURE in line for line in child.log_lines):
            raise errors.PortTakenError("the service could not start: an address is in use", child.log_lines)
        kind = errors.StartRefusedError if child.returncode == _WRONG_SETTINGS else errors.DemoFailedError
        raise kind(f"the service could not start: exit code {child.returncode}", child.log_lines)

    async def _follow(self, child: ServeChild, addresses: ServiceAddresses, seeds: SeedHistory) -> GetStatusResponse:
        try:
            with render.live_view(Console(file=sys.stderr if self.as_json else sys.stdout)) as show:

                def update(status: GetStatusResponse) -> None:
                    seeds.update(status)
                    show(status)

                last = await follow_run(Target(connectable(addresses.grpc), TIMEOUT_S), update)
        except errors.ServiceUnreachableError as error:
            what = f"the service does not answer: {error}"
            # The connection is lost a moment before the process exits.
            with suppress(TimeoutError):
                async with asyncio.timeout(_EXIT_TIMEOUT_S):
                    await child.wait()
                what = f"the service ended during its run with exit code {child.returncode}"
            raise errors.DemoFailedError(what, child.log_lines) from None
        if last.state == RunState.RUN_STATE_FAILED:
            reason = render.one_line(last.state_reason) or "no reason given"
            raise errors.DemoFailedError(f"the run failed: {reason}", child.log_lines)
        return last

    def _print(self, line: str) -> None:
        typer.echo(line, err=self.as_json)

    def _free_ports(self) -> list[str]:
        """Returns overrides that choose a free port for each listening address left at its default."""
        listen = [
            ("server.listen", self.settings.server.listen, ServerSettings().listen),
            ("metrics.listen", self.settings.metrics.listen, MetricsSettings().listen),
        ]
        return [f"{name}={Address(Address.parse(used).host, 0)}" for name, used, default in listen if used == default]


def _as_options(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


class Interrupts:
    """The signal that has cancelled a task, if any."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.received: int | None = None
        self._task = task

    def cancel(self, signal_number: int) -> None:
        """Cancels the task."""
        self.received = signal_number
        self._task.cancel()

    @contextmanager
    def end_wait(self) -> Iterator[None]:
        """A block that a signal ends without an error."""
        try:
            yield
        except asyncio.CancelledError:
            if self.received is None or self._task.uncancel() > 0:
                raise
            self.received = None


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Cancels the current task on SIGINT or SIGTERM, then raises SignalledError; a second one cancels its cleanup."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is None:
        raise RuntimeError("interrupts need a task to cancel")
    signals = Interrupts(task)
    for number in _SIGNALS:
        loop.add_signal_handler(number, signals.cancel, number)
    try:
        yield signals
    except asyncio.CancelledError:
        if signals.received is None:
            raise
        task.uncancel()
        raise errors.SignalledError(signals.received) from None
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


@dataclass(frozen=True, slots=True)
class ServiceAddresses:
    """The addresses that a service has logged."""

    grpc: Address
    metrics: Address


class ServeChild(asyncio.SubprocessProtocol):
    """A `tolaria serve` child process. Keeps the last lines of its output and the addresses that it logs."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=LOG_LINES_MAX)
        self._addresses: ServiceAddresses | None = None
        self._serving_or_closed = asyncio.Event()
        self._exited = asyncio.Event()
        self._closed = asyncio.Event()
        self._unfinished: dict[int, bytes] = {}
        self._transport: asyncio.SubprocessTransport

    @property
    def log_lines(self) -> list[str]:
        """At most LOG_LINES_MAX lines of its standard output and error, the oldest first."""
        return list(self._lines)

    @property
    def returncode(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._transport.get_returncode()

    async def addresses(self, timeout_s: float) -> ServiceAddresses | None:
        """Waits until the service listens; returns None if it exits instead. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            await self._serving_or_closed.wait()
        return self._addresses

    async def wait(self) -> None:
        """Waits until it has exited and its output has been read."""
        await self._closed.wait()

    async def stop(self, timeout_s: float) -> None:
        """Sends SIGTERM, then SIGKILL to its process group after `timeout_s` or when cancelled."""
        try:
            if self.returncode is None:
                self._transport.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._exited.wait()
        finally:
            if self.returncode is None:
                with suppress(ProcessLookupError):  # it may exit at this moment
                    os.killpg(self._transport.get_pid(), signal.SIGKILL)
                async with asyncio.timeout(_KILL_TIMEOUT_S):
                    await self._exited.wait()
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.SubprocessTransport)  # noqa: S101 - as SubprocessProtocol documents
        self._transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Splits the output into lines of bounded length; called by asyncio."""
        *finished, rest = (self._unfinished.get(fd, b"") + data).split(b"\n")
        if len(rest) > LINE_BYTES_MAX:
            finished, rest = [*finished, rest], b""
        self._unfinished[fd] = rest
        for line in finished:
            self._keep(line[:LINE_BYTES_MAX])

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Called by asyncio."""
        if rest := self._unfinished.pop(fd, b""):
            self._keep(rest)

    def process_exited(self) -> None:
        """Called by asyncio."""
        self._exited.set()
        # A grandchild may hold the pipes open for any time.
        asyncio.get_running_loop().call_later(_LOG_TIMEOUT_S, self.connection_lost, None)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Called by asyncio."""
        self._serving_or_closed.set()
        self._closed.set()

    def _keep(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        self._lines.append(text)
        if self._addresses is None and (addresses := _logged_addresses(text)):
            self._addresses = addresses
            self._serving_or_closed.set()


@asynccontextmanager
async def serve_child(command: Sequence[str], *, stop_timeout_s: float) -> AsyncIterator[ServeChild]:
    """Runs `command` until the block ends, then stops it.

    The child's standard input closes when this process dies, which ends a child started with --while-stdin. Its own
    session keeps Ctrl-C from reaching it directly.
    """
    pipe = asyncio.subprocess.PIPE
    loop = asyncio.get_running_loop()
    _, child = await loop.subprocess_exec(
        ServeChild, *command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        yield child
    finally:
        await child.stop(stop_timeout_s)


def _logged_addresses(line: str) -> ServiceAddresses | None:
    """Parses the log event `serving`; returns None for any other line."""
    try:
        entry = json.loads(line)
        if entry["event"] != "serving":
            return None
        return ServiceAddresses(Address.parse(entry["grpc"]), Address.parse(entry["metrics"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(slots=True)
class SeedRecord:
    """The history of one seed. Epochs count from 1; accuracies are validation accuracies in [0, 1], None if unknown."""

    seed_id: str
    blueprint_id: str
    stage: int
    epoch_germinated: int | None = None
    epoch_ended: int | None = None  # fossilized or culled
    accuracy_before: float | None = None  # the last one before the seed began to blend
    accuracy_after: float | None = None  # the one when the seed ended, or the latest; None if it has never blended

    def update(self, stage: int, epoch: int, accuracy: float | None) -> None:
        """Records the next status; a rollback may return the seed to an earlier stage."""
        self.stage = stage
        if stage in _BEFORE_BLENDING:
            self.accuracy_before, self.accuracy_after, self.epoch_ended = accuracy, None, None
        elif stage in _BLENDING:
            self.accuracy_after, self.epoch_ended = accuracy, None
        elif self.epoch_ended is None:
            self.epoch_ended = epoch
            # A seed culled before it blended has had no effect on the accuracy.
            if stage in _PART_OF_HOST or self.accuracy_after is not None:
                self.accuracy_after = accuracy

    def line(self) -> str:
        """Returns the history on one line."""
        name = render.one_line(f"{self.seed_id} {self.blueprint_id}")
        begin = "germinated unseen" if self.epoch_germinated is None else f"epoch {self.epoch_germinated} germinated"
        if self.epoch_ended is None:
            end, when = f"{render.enum_word(enums.SeedLifecycleStage.DESCRIPTOR, self.stage)} at the end", "at the end"
        elif self.stage in _PART_OF_HOST:
            end, when = f"{self.epoch_ended} fossilized", "after"
        else:
            end, when = f"{self.epoch_ended} culled", "when it was culled"
        if self.accuracy_after is None:
            return f"{name}: {begin}, {end}; it did not blend"
        before = "unknown" if self.accuracy_before is None else f"{self.accuracy_before:.2%}"
        return f"{name}: {begin}, {end}; accuracy {before} before it blended, {self.accuracy_after:.2%} {when}"


class SeedHistory:
    """The history of each seed that any status has shown, in order of appearance."""

    def __init__(self) -> None:
        self.records: dict[str, SeedRecord] = {}

    def update(self, status: GetStatusResponse) -> None:
        """Records the next status."""
        # Both validation figures are 0 before the first validation.
        validated = status.validation_loss or status.validation_accuracy
        accuracy = _finite(status.validation_accuracy) if validated else None
        for seed in status.seeds:
            record = self.records.get(seed.seed_id)
            removed = record is not None and record.stage not in _BEFORE_BLENDING | _BLENDING | _PART_OF_HOST
            if record is None or (removed and seed.stage == enums.SEED_STAGE_GERMINATED):
                germinated = status.epoch if seed.stage in _BEFORE_BLENDING else None
                record = SeedRecord(seed.seed_id, seed.blueprint_id, seed.stage, germinated)
                self.records[seed.seed_id] = record
            record.update(seed.stage, status.epoch, accuracy)


def summary_json(status: GetStatusResponse, seeds: SeedHistory, wall_s: float) -> str:
    """Returns the summary as one line of JSON; a figure that is unknown or not finite is null."""
    stages = enums.SeedLifecycleStage.DESCRIPTOR.values_by_number
    return json.dumps(
        {
            "final_accuracy": _finite(status.validation_accuracy),
            "epochs": status.epoch,
            "steps": status.global_step,
            "wall_seconds": round(wall_s, 3),
            "boundary_ms_p50": _finite(status.boundary_ms_p50),
            "boundary_ms_p99": _finite(status.boundary_ms_p99),
            "seeds": [
                {
                    "seed_id": seed.seed_id,
                    "stage": stages[seed.stage].name if seed.stage in stages else str(seed.stage),
                    "blueprint_id": seed.blueprint_id,
                    "epoch_germinated": seeds.records[seed.seed_id].epoch_germinated,
                    "accuracy_before": seeds.records[seed.seed_id].accuracy_before,
                    "accuracy_after": seeds.records[seed.seed_id].accuracy_after,
                }
                for seed in status.seeds
            ],
            "commands": status.commands_accepted,
            "rollbacks": status.rollbacks,
        }
    )


def summary_lines(status: GetStatusResponse, seeds: SeedHistory, wall_s: float) -> list[str]:
    """Returns the summary as text, with a line for each seed, including removed ones."""
    epochs = "1 epoch" if status.epoch == 1 else f"{status.epoch} epochs"
    return [
        (
            f"{render.one_line(status.job) or 'the run'} finished: accuracy {status.validation_accuracy:.2%} after "
            f"{epochs} ({status.global_step} steps) in {wall_s:.1f} s"
        ),
        (
            f"boundary p50 {status.boundary_ms_p50:.1f} ms, p99 {status.boundary_ms_p99:.1f} ms "
            f"of {status.boundary_budget_ms:g} ms; "
            f"commands {render.command_counts(status)}; seeds: {render.seed_list(status.seeds)}"
        ),
        *(record.line() for record in seeds.records.values()),
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
