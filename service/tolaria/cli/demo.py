"""`tolaria demo`: runs `tolaria serve` as a child process, follows its run, and reports what the seeds achieved.

Beside it a second service trains the same run: without seeds, or with chaos undisturbed.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import anyio
import typer
from rich.console import Console

from leyline.v1.admin_service_pb2 import GetStatusResponse, ListIncidentsRequest, RunState
from tolaria.cli import errors, render
from tolaria.cli.admin_commands import CHAOS_EPOCHS, DEMO_EPOCHS, TIMEOUT_S
from tolaria.cli.chaos import CHAOS_SETTINGS, Chaos, Injury, check_chaos, injuries_of, ranks_in
from tolaria.cli.client import Target, admin_stub, connectable, follow_run
from tolaria.cli.harm import death_line, harm_of
from tolaria.cli.process_tree import ProcessTree
from tolaria.cli.report import RunRecord, summary_json, summary_lines
from tolaria.cli.serve_child import ServeChild, ServiceAddresses, serve_child
from tolaria.config import Address, Connection, Settings, connection, load_settings
from tolaria.processes import running

BIND_FAILURE = "cannot listen on"  # part of BindError's message, in the log of a child whose port is taken
_EXIT_TIMEOUT_S = 2.0
_WRONG_SETTINGS = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# A host that needs its seeds, half of the images for each of two seeds, and a corrupt shard on the way.
_OPTIONS: Final = {
    "host": "thumbnail",
    "learning_rate": 0.1,
    "seed_sources": 2,
    "poison_epoch": 40,
    "poison_batches": 10,
}

DEMO_SETTINGS: Final[Mapping[str, object]] = {
    "training.options": _OPTIONS,
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

# Batches without numbers are skipped. Corrupt ones that are finite lead to a rollback, to a restore point that depends
# on time, so that two runs may go on differently.
_SKIPPED_SHARD: Final[Mapping[str, object]] = {"training.options": {**_OPTIONS, "poison": "nan"}}

RANK_SETTINGS: Final[Mapping[str, object]] = {"training.device": "cpu", "training.threads": 1}
"""Settings of a demo with a number of ranks; each can be overridden."""


@dataclass(frozen=True, slots=True)
class Directories:
    """Where a demo's service keeps its state, and the one beside it."""

    state: Path
    beside: Path


@dataclass(frozen=True, slots=True)
class Demo:
    """A planned demo. `arguments` are the options of `serve`, which are appended to `program`.

    `compare`: whether the same run without seeds is trained beside it. `injuries`: what is done to the lane; if it is
    not empty, the same run without them is trained beside it instead.
    """

    settings: Settings
    arguments: tuple[str, ...]
    stay: bool
    as_json: bool
    compare: bool = False
    injuries: tuple[Injury, ...] = ()
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
        ranks: int | None = None,
        chaos: bool = False,
    ) -> Demo:
        """Checks the settings before anything is started. Raises ConfigurationError if they are invalid."""
        given = [*overrides, *([f"training.epochs={epochs}"] if epochs is not None else [])]
        if ranks is not None:
            given += [f"lane.mode={'process' if ranks == 1 else 'torchrun'}", f"lane.processes={ranks}"]
        chosen = load_settings(config_file, given)
        own_job = not {"job", "options"} & chosen.training.model_fields_set
        for name, value in _defaults(own_job=own_job, ranks=ranks is not None, chaos=chaos).items():
            section, _, field = name.partition(".")
            if field not in getattr(chosen, section).model_fields_set:
                given.append(f"{name}={json.dumps(value) if isinstance(value, dict) else value}")
        settings = load_settings(config_file, given)
        if chaos:
            check_chaos(settings, stay=stay, alone=alone)
        # The demo reads the child's addresses from its log, and decides when the child exits.
        required = ["logging.format=json", "service.exit_when_done=false"]
        if settings.logging.level not in {"debug", "info"}:
            required.append("logging.level=info")
        config = ["--config", str(config_file)] if config_file else []
        arguments = (*config, *_as_options([*given, *required]))
        compare, injuries = own_job and not alone and not chaos, injuries_of(settings) if chaos else ()
        return cls(settings, arguments, stay, as_json, compare, injuries)

    def run(self) -> None:
        """Runs the demo; its state is temporary unless state.dir is set. Raises CommandFailedError, SignalledError."""
        with tempfile.TemporaryDirectory(prefix="tolaria-demo-") as temporary:
            arguments, directories = self.arguments, Directories(Path(temporary) / "run", Path(temporary) / "beside")
            if "dir" in self.settings.state.model_fields_set:
                directories = replace(directories, state=Path(self.settings.state.dir))
            else:
                arguments = (*arguments, *_as_options([f"state.dir={directories.state}"]))
            asyncio.run(self._run(arguments, directories))

    async def _run(self, arguments: tuple[str, ...], directories: Directories) -> None:
        with interrupts() as signals:
            try:
                await self._attempt(arguments, directories, signals)
            except errors.PortTakenError as error:
                free_ports = self._free_ports()
                if not free_ports:
                    raise
                self._print(f"{render.one_line(str(error).splitlines()[0])}; starting again on free ports")
                await self._attempt((*arguments, *_as_options(free_ports)), directories, signals)

    async def _attempt(self, arguments: tuple[str, ...], directories: Directories, signals: Interrupts) -> None:
        started_s = time.monotonic()
        self._announce()
        chaos, run = Chaos(self.injuries), RunRecord()
        other = RunRecord() if self.compare or self.injuries else None
        command, stop_timeout_s = self.serve_command(arguments), self.stop_timeout_s
        async with serve_child(command, stop_timeout_s=stop_timeout_s, on_entry=chaos.on_entry) as child:
            addresses = await self._addresses(child)
            async with self._beside(arguments, directories.beside, other, chaos) as over:
                if self.injuries:
                    async with chaos.inflicted(child.pid, self.target(addresses)):
                        await self._follow(child, addresses, run, chaos=chaos)
                else:
                    await self._follow(child, addresses, run, other)
                await over.wait()
            if not self.injuries:
                self._report(run, other, time.monotonic() - started_s)
                await self._serve_on(child, addresses, signals)
                return
        await self._report_chaos(run, chaos, directories, other.failure if other else "", started_s)

    def serve_command(self, arguments: Sequence[str]) -> tuple[str, ...]:
        """Returns the command of a service with these options."""
        return (*self.program, "serve", "--while-stdin", *arguments)

    @property
    def stop_timeout_s(self) -> float:
        """Seconds after which a service that is to end is killed."""
        return self.settings.service.drain_timeout_s + self.stop_margin_s

    def _announce(self) -> None:
        ranks = ranks_in(self.settings)
        with_ranks = f" with {ranks} ranks" if ranks > 1 else ""
        self._print(f"starting a service{with_ranks}; it takes a few seconds")
        if self.injuries:
            victims = ", ".join(dict.fromkeys(injury.victim for injury in self.injuries))
            self._print(
                f"chaos will hit {victims}, {len(self.injuries)} times; the same run undisturbed trains beside it"
            )

    @asynccontextmanager
    async def _beside(
        self, arguments: Sequence[str], state_dir: Path, record: RunRecord | None, chaos: Chaos
    ) -> AsyncIterator[anyio.Event]:
        """Trains the other run, if there is one, while the block runs; yields an event that is set when it is over."""
        if record is None:
            over = anyio.Event()
            over.set()
            yield over
            return
        changes = () if self.injuries else ("seeds.enabled=false",)
        other = RunBeside(self, (*arguments, *_as_options(changes)), state_dir, record, chaos.tree)
        async with running(other.follow):
            yield other.over

    def _report(self, run: RunRecord, other: RunRecord | None, wall_s: float) -> None:
        for line in summary_lines(run, other, wall_s):
            self._print(line)
        if self.as_json:
            typer.echo(summary_json(run, other, wall_s))

    async def _serve_on(self, child: ServeChild, addresses: ServiceAddresses, signals: Interrupts) -> None:
        """Returns at once, or serves until a signal comes, with --stay."""
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

    async def _report_chaos(
        self, run: RunRecord, chaos: Chaos, directories: Directories, failure: str, started_s: float
    ) -> None:
        """Reports once both services have ended. Raises CommandFailedError if anything was lost."""
        harm = await harm_of(
            chaos,
            seed=self.settings.training.seed,
            state_dir=directories.state,
            undisturbed_dir=directories.beside,
            failure=failure,
            rollbacks=len(run.rollbacks),
        )
        wall_s = time.monotonic() - started_s
        for line in [*summary_lines(run, None, wall_s), *harm.lines()]:
            self._print(line)
        if self.as_json:
            typer.echo(summary_json(run, None, wall_s, harm.as_json()))
        if harm.problems:
            raise errors.CommandFailedError(f"chaos did harm: {'; '.join(harm.problems)}")

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
        self,
        child: ServeChild,
        addresses: ServiceAddresses,
        run: RunRecord,
        other: RunRecord | None = None,
        chaos: Chaos | None = None,
    ) -> None:
        target = self.target(addresses)

        def curves() -> list[str]:
            deaths = [death_line(death) for death in chaos.deaths] if chaos else []
            return [*run.curves.lines(other.curves if other else None), *deaths]

        try:
            with render.live_view(Console(file=sys.stderr if self.as_json else sys.stdout), curves) as show:

                def update(status: GetStatusResponse) -> None:
                    run.update(status)
                    show(status)

                last = await follow_run(target, update)
            if chaos is not None:
                chaos.observe(last)
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

    def target(self, addresses: ServiceAddresses) -> Target:
        """Returns a service of the demo, with what the environment has to present if the settings require it."""
        address, server = connectable(addresses.grpc), self.settings.server
        presented = connection(address=str(address)) if server.tokens or server.tls_cert else Connection()
        return Target(address, TIMEOUT_S, presented)

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


class RunBeside:
    """The same run in a second service, on free ports, with its state in another directory."""

    def __init__(
        self, demo: Demo, arguments: Sequence[str], state_dir: Path, record: RunRecord, tree: ProcessTree
    ) -> None:
        self._demo, self._arguments, self._record = demo, tuple(arguments), record
        self._state_dir, self._tree = state_dir, tree
        self.over = anyio.Event()

    async def follow(self) -> None:
        """A task: records the run until it is over; a failure is recorded and does not end the demo."""
        try:
            await self._follow()
        except (errors.CommandFailedError, errors.ServiceUnreachableError, TimeoutError) as error:
            self._record.failure = str(error).splitlines()[0] or "it did not start in time"
        finally:
            self.over.set()

    async def _follow(self) -> None:
        own = ["server.listen=127.0.0.1:0", "metrics.listen=127.0.0.1:0", "signals.path="]
        options = _as_options([*own, f"state.dir={self._state_dir}"])
        command = self._demo.serve_command((*self._arguments, *options))
        async with serve_child(command, stop_timeout_s=self._demo.stop_timeout_s) as child:
            self._tree.add(child.pid)
            addresses = await child.addresses(self._demo.start_timeout_s)
            if addresses is None:
                raise child.failure(f"exit code {child.returncode}")
            target = self._demo.target(addresses)
            last = await follow_run(target, self._record.update)
            if last.state == RunState.RUN_STATE_FAILED:
                self._record.failure = last.state_reason


def _defaults(*, own_job: bool, ranks: bool, chaos: bool) -> dict[str, object]:
    """Returns the settings of a demo with these options that nothing else sets."""
    defaults: dict[str, object] = {"training.epochs": CHAOS_EPOCHS if chaos else DEMO_EPOCHS}
    for wanted, settings in (
        (own_job, DEMO_SETTINGS),
        (own_job and chaos, _SKIPPED_SHARD),
        (chaos, CHAOS_SETTINGS),
        (ranks, RANK_SETTINGS),
    ):
        defaults.update(settings if wanted else {})
    return defaults


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
