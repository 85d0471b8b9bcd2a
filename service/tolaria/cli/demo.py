"""`tolaria demo`: runs `tolaria serve` as a child process, follows its run, and reports what each seed achieved."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import anyio
import typer
from rich.console import Console

from leyline.v1 import enums_pb2 as enums
from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState
from tolaria.cli import errors, render
from tolaria.cli.admin_commands import DEMO_EPOCHS, TIMEOUT_S
from tolaria.cli.client import Target, connectable, follow_run
from tolaria.config import Address, Settings, load_settings
from tolaria.processes import ChildCommand, ChildProcess, running

BIND_FAILURE = "cannot listen on"  # part of BindError's message, in the log of a child whose port is taken
LOG_LINES_MAX = 200
LINE_LENGTH_MAX = 64 * 1024
_LOG_LINES_SHOWN = 20
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
        """Runs the demo; its state is temporary unless state.dir is set. Raises CommandFailedError, SignalledError."""
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
        started_s = time.monotonic()
        self._print("starting a service; it takes a few seconds")
        command = (*self.program, "serve", "--while-stdin", *arguments)
        stop_timeout_s = self.settings.service.drain_timeout_s + self.stop_margin_s
        async with serve_child(command, stop_timeout_s=stop_timeout_s) as child:
            addresses = await self._addresses(child)
            seeds = SeedHistory()
            last = await self._follow(child, addresses, seeds)
            wall_s = time.monotonic() - started_s
            for line in summary_lines(last, seeds, wall_s):
                self._print(line)
            if self.as_json:
                typer.echo(summary_json(last, seeds, wall_s))
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

    async def _follow(self, child: ServeChild, addresses: ServiceAddresses, seeds: SeedHistory) -> GetStatusResponse:
        try:
            with render.live_view(Console(file=sys.stderr if self.as_json else sys.stdout)) as show:

                def update(status: GetStatusResponse) -> None:
                    seeds.update(status)
                    show(status)

                last = await follow_run(Target(connectable(addresses.grpc), TIMEOUT_S), update)
        except errors.ServiceUnreachableError as error:
            # The connection is lost a moment before the process exits.
            with anyio.move_on_after(_EXIT_TIMEOUT_S):
                await child.wait()
                raise child.failure(f"the service ended during its run: exit code {child.returncode}") from None
            raise child.failure(f"the service does not answer: {error}") from None
        if last.state == RunState.RUN_STATE_FAILED:
            raise child.failure(f"the run failed: {render.one_line(last.state_reason) or 'no reason given'}")
        return last

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


@dataclass(slots=True)
class SeedSummary:
    """The history of one seed. Epochs count from 1; accuracies are validation accuracies in [0, 1], None if unknown."""

    seed_id: str
    stage: int
    blueprint_id: str
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
        self.seeds: dict[str, SeedSummary] = {}

    def update(self, status: GetStatusResponse) -> None:
        """Records the next status."""
        # Both validation figures are 0 before the first validation.
        validated = status.validation_loss or status.validation_accuracy
        accuracy = _finite(status.validation_accuracy) if validated else None
        for seed in status.seeds:
            known = self.seeds.get(seed.seed_id)
            removed = known is not None and known.stage not in _BEFORE_BLENDING | _BLENDING | _PART_OF_HOST
            if known is None or (removed and seed.stage == enums.SEED_STAGE_GERMINATED):
                germinated = status.epoch if seed.stage in _BEFORE_BLENDING else None
                known = self.seeds[seed.seed_id] = SeedSummary(seed.seed_id, seed.stage, seed.blueprint_id, germinated)
            known.update(seed.stage, status.epoch, accuracy)


def summary_json(status: GetStatusResponse, history: SeedHistory, wall_s: float) -> str:
    """Returns the summary as one line of JSON; a figure that is unknown or not finite is null."""
    stages = enums.SeedLifecycleStage.DESCRIPTOR.values_by_number
    seeds = [asdict(history.seeds[seed.seed_id]) for seed in status.seeds]
    for seed in seeds:
        del seed["epoch_ended"]
        seed["stage"] = stages[seed["stage"]].name if seed["stage"] in stages else str(seed["stage"])
    return json.dumps(
        {
            "final_accuracy": _finite(status.validation_accuracy),
            "epochs": status.epoch,
            "steps": status.global_step,
            "wall_seconds": round(wall_s, 3),
            "boundary_ms_p50": _finite(status.boundary_ms_p50),
            "boundary_ms_p99": _finite(status.boundary_ms_p99),
            "seeds": seeds,
            "commands": status.commands_accepted,
            "rollbacks": status.rollbacks,
        }
    )


def summary_lines(status: GetStatusResponse, history: SeedHistory, wall_s: float) -> list[str]:
    """Returns the summary as text, with a line for each seed, including removed ones."""
    epochs = "1 epoch" if status.epoch == 1 else f"{status.epoch} epochs"
    accuracy = f"accuracy {status.validation_accuracy:.2%} after {epochs} ({status.global_step} steps)"
    boundary = f"boundary p50 {status.boundary_ms_p50:.1f} ms, p99 {status.boundary_ms_p99:.1f} ms"
    counts = f"commands {render.command_counts(status)}; seeds: {render.seed_list(status.seeds)}"
    return [
        f"{render.one_line(status.job) or 'the run'} finished: {accuracy} in {wall_s:.1f} s",
        f"{boundary} of {status.boundary_budget_ms:g} ms; {counts}",
        *(seed.line() for seed in history.seeds.values()),
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
