"""Peers in a separate process that hang or answer immediately, and a run that is connected to them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
from anyio.streams.buffered import BufferedByteReceiveStream

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_SEED
from leyline.v1.kasmina_service_pb2 import ApplyCommandResponse
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.hanging_child import Behaviour, Footprint, Handlers
from support.peers import command
from support.processes import python_path
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.config import ControlSettings, KasminaSettings, TamiyoSettings
from tolaria.errors import PeerTimeoutError
from tolaria.peers.connect import Peers, connected_peers
from tolaria.resilience.breaker import Breaker, BreakerPolicy
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics

CHILD = Path(__file__).parent / "hanging_child.py"
_STATE = SystemStatePacket(version=1, training_run_id="run")


class PeerProcess:
    """Both peers on one port, in a child process."""

    def __init__(self, process: anyio.abc.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, BufferedByteReceiveStream(process.stdout)
        self.target = ""

    async def read_target(self) -> None:
        """Reads the address of the peers, once the child prints it."""
        self.target = (await self._line()).decode()

    async def handlers(self) -> Handlers:
        """Returns the child's current counts."""
        await self._stdin.send(b"\n")
        counts = json.loads(await self._line())
        return Handlers(**counts | {"footprint": Footprint(**counts["footprint"])})

    async def idle(self, before: Footprint) -> Handlers:
        """Waits up to a minute until no handler runs and no more tasks than in `before`; returns the counts."""
        with anyio.fail_after(180):
            while True:
                now = await self.handlers()
                if not now.running and now.footprint.tasks <= before.tasks:
                    return now
                await anyio.sleep(0.01)

    async def _line(self) -> bytes:
        return await self._stdout.receive_until(b"\n", 4096)


@asynccontextmanager
async def peer_process(behaviour: Behaviour) -> AsyncIterator[PeerProcess]:
    """Runs the child process while the block runs."""
    command_line = [sys.executable, str(CHILD), behaviour]
    environment = {"PYTHONPATH": python_path(), "GRPC_VERBOSITY": "NONE"}
    async with await anyio.open_process(command_line, stdin=subprocess.PIPE, stderr=None, env=environment) as process:
        child = PeerProcess(process)
        with anyio.fail_after(180):
            await child.read_target()
        try:
            yield child
        finally:
            process.kill()


@asynccontextmanager
async def connected(
    target: str, *, timeout_s: float, run: RunUnderTest | None = None, in_flight_max: int = 8
) -> AsyncIterator[Peers]:
    """Connects clients with the breakers and telemetry of a run; without a run, with breakers that never open."""
    tolerant = BreakerPolicy(failures_max=10**9)
    own = {name: Breaker(name, clock=time.monotonic, policy=tolerant) for name in ("tamiyo", "kasmina")}
    async with connected_peers(
        TamiyoSettings(target=target, timeout_s=timeout_s, in_flight_max=in_flight_max),
        KasminaSettings(target=target, timeout_s=timeout_s, in_flight_max=in_flight_max),
        breakers=run.safeguards.breakers if run else own,
        metrics=run.metrics if run else Metrics(),
        emitter=run.emitter if run else Emitter(),
    ) as peers:
        yield peers


CALLS: dict[str, Callable[[Peers], Awaitable[object]]] = {
    "EvaluateEpoch": lambda peers: peers.tamiyo.evaluate_epoch(_STATE),
    "EvaluateStep": lambda peers: peers.tamiyo.evaluate_step(_STATE),
    "ExportSeedStates": lambda peers: peers.kasmina.export_seeds(_STATE),
    "ApplyCommand": lambda peers: peers.kasmina.apply(command(COMMAND_SEED), _STATE),
}
"""Every call to the peers."""


async def count_timeouts(peers: Peers, methods: Sequence[str], times: int) -> int:
    """Calls the methods in turn, `times` calls in all; returns how many of them timed out."""
    timeouts = 0
    for number in range(times):
        try:
            await CALLS[methods[number % len(methods)]](peers)
        except PeerTimeoutError:
            timeouts += 1
    return timeouts


@asynccontextmanager
async def calling(peers: Peers) -> AsyncIterator[Counter[str]]:
    """Calls both peers repeatedly, one call at a time each, while the block runs.

    Yields the numbers of calls that timed out, by method.
    """
    timeouts: Counter[str] = Counter()

    async def call(method: str) -> None:
        while True:
            try:
                await CALLS[method](peers)
            except PeerTimeoutError:
                timeouts[method] += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, "EvaluateEpoch")
        tasks.start_soon(call, "ExportSeedStates")
        yield timeouts
        tasks.cancel_scope.cancel()


class ConnectedPeers(FakePeers):
    """Peers of a run that are called through real clients; `clients` is set before the run begins."""

    clients: Peers

    async def evaluate_epoch(self, state: SystemStatePacket) -> AdaptationCommand | None:
        return await self.clients.tamiyo.evaluate_epoch(state)

    async def evaluate_step(self, state: SystemStatePacket) -> AdaptationCommand | None:
        return await self.clients.tamiyo.evaluate_step(state)

    async def apply(self, command: AdaptationCommand, state: SystemStatePacket) -> ApplyCommandResponse:
        return await self.clients.kasmina.apply(command, state)

    async def export_seeds(self, state: SystemStatePacket, refusals: Sequence[tuple[str, str]] = ()) -> list[SeedState]:
        return await self.clients.kasmina.export_seeds(state, refusals)


@asynccontextmanager
async def training(
    target: str,
    *,
    timeout_s: float,
    control: ControlSettings | None = None,
    job: str = "TinyJob",
    options: Mapping[str, int] | None = None,
) -> AsyncIterator[tuple[RunUnderTest, ConnectedPeers]]:
    """Yields a run that does not end by itself and its peers, which it calls through its own circuit breakers."""
    peers = ConnectedPeers()
    run = new_run(peers, job=job, control=control or ControlSettings(), epochs=10**6, options=dict(options or {}))
    async with connected(target, timeout_s=timeout_s, run=run) as peers.clients, running(run):
        yield run, peers


async def steps_per_s(run: RunUnderTest, *, after_steps: int, seconds: float) -> float:
    """Measures the steps per second of a run, boundaries included, after its first `after_steps` steps."""
    await run.until(lambda: run.status.global_step >= after_steps)
    since_s, step = time.perf_counter(), run.status.global_step
    await anyio.sleep(seconds)
    return (run.status.global_step - step) / (time.perf_counter() - since_s)
