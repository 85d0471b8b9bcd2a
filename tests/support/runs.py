"""A complete run with a lane in a thread, wired as in the service, with peers scripted by the test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import anyio
import anyio.to_thread

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.kasmina_service_pb2 import ApplyCommandResponse
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.events import RecordingEmitter
from support.peers import as_clients
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import ControlSettings, Settings, TrainingSettings
from tolaria.emergency.supervision import watch_board
from tolaria.filesystem import Filesystem
from tolaria.journal.rows import EmergencyRow, RunRow
from tolaria.lane.build import BuiltLane, build
from tolaria.lane.messages import SkipBatches
from tolaria.lane.train_module import TrainModule
from tolaria.peers.clients import RollbackClient
from tolaria.peers.connect import Peers
from tolaria.peers.consultation import Consultations
from tolaria.rollback.protocol import RollbackParticipant
from tolaria.run.resume import retention_of
from tolaria.run.run import TrainingRun
from tolaria.run.status import state_name
from tolaria.service.foundation import Foundation
from tolaria.service.wiring import Core, RunService
from tolaria.service.wiring import new_run as wire
from tolaria.signals import SignalBoard
from tolaria.telemetry.logging import LogContext
from tolaria.telemetry.metrics import Metrics

Answer = Callable[[SystemStatePacket], Awaitable[AdaptationCommand | None]]


async def no_change(_state: SystemStatePacket) -> AdaptationCommand | None:
    """The answer of a controller that requests no change."""
    return None


class AcceptingParticipant:
    """A participant of rollbacks that accepts everything."""

    async def prepare(self, order: object, /) -> object:
        return _Accepted()

    async def commit(self, order: object, /) -> object:
        return _Accepted()

    async def confirm(self, order: object, /) -> object:
        return _Accepted()

    async def abort(self, order: object, /) -> object:
        return _Accepted()


class _Accepted:
    accepted, detail = True, ""


class FakePeers:
    """Tamiyo and Kasmina in one object; the test sets `answer` and `seeds`."""

    def __init__(self, answer: Answer = no_change, seeds: list[SeedState] | None = None) -> None:
        self.answer = answer
        self.seeds = seeds or []
        self.states: list[SystemStatePacket] = []
        self.step_states: list[SystemStatePacket] = []
        self.applied: list[AdaptationCommand] = []
        self.refusals: list[tuple[str, str]] = []
        self.accepts = True
        self.participants: Mapping[str, RollbackParticipant] = {}
        """Participants of rollbacks by peer; a peer without one accepts everything."""

    async def evaluate_epoch(self, state: SystemStatePacket) -> AdaptationCommand | None:
        """Answers as scripted."""
        self.states.append(state)
        return await self.answer(state)

    async def evaluate_step(self, state: SystemStatePacket) -> AdaptationCommand | None:
        """Answers as scripted, between epochs."""
        self.step_states.append(state)
        return await self.answer(state)

    async def apply(self, command: AdaptationCommand, state: SystemStatePacket) -> ApplyCommandResponse:
        """Accepts every command unless `accepts` is False."""
        self.applied.append(command)
        detail = "germinated" if self.accepts else "no room"
        return ApplyCommandResponse(applied=self.accepts, detail=detail, seeds=self.seeds)

    async def export_seeds(self, state: SystemStatePacket, refusals: Sequence[tuple[str, str]] = ()) -> list[SeedState]:
        """Returns the scripted seeds."""
        self.refusals = list(refusals)
        return self.seeds

    def connected(self) -> Peers:
        """Returns the peers in the form in which the service uses them."""
        tamiyo, kasmina = as_clients(self)
        participants = {name: self.participants.get(name, AcceptingParticipant()) for name in ("tamiyo", "kasmina")}
        return Peers(
            tamiyo,
            kasmina,
            cast("RollbackClient", participants["tamiyo"]),
            cast("RollbackClient", participants["kasmina"]),
        )


class RunUnderTest:
    """A run and the parts of it that tests inspect."""

    def __init__(self, core: Core, service: RunService, build: BuiltLane) -> None:
        self.core = core
        self.service = service
        self.run: TrainingRun = service.run
        self.recovery = service.recovery
        self.checkpointing = core.checkpointing
        self.consultations = cast("Consultations", service.consultations)  # tests of runs without a controller ask none
        self.status = core.status
        self.health = core.health
        self.safety, self.safeguards = core.safety, core.safeguards
        self.board = core.foundation.board
        self.metrics = core.foundation.metrics
        self.emitter = cast("RecordingEmitter", core.foundation.emitter)
        self.journal = core.journal
        self.storage = core.foundation.storage
        self.module: TrainModule = build.module
        self.job: Any = build.module.job

    @property
    def state(self) -> str:
        """The run's state without its prefix."""
        return state_name(self.status.state).upper()

    @property
    def events(self) -> list[str]:
        """Names of the events so far."""
        return self.emitter.names

    def sample(self, name: str, labels: dict[str, str] | None = None) -> float | None:
        """Returns the value of a metric, by its dotted name with suffix."""
        return self.metrics.registry.get_sample_value(name, labels)

    async def until(self, predicate: Callable[[], bool]) -> None:
        """Waits until `predicate()` is true, for at most a minute."""
        with anyio.fail_after(180):
            while not predicate():
                await anyio.sleep(0.002)

    async def lane_answers(self, times: int = 10) -> None:
        """Gives the lane commands without effect, one by one: between two of them a lane that is not held trains."""
        for _ in range(times):
            await self.core.lane.call(SkipBatches(()))


def new_run(
    peers: FakePeers,
    *,
    job: str = "TinyJob",
    control: ControlSettings | None = None,
    sections: dict[str, object] | None = None,
    files: Filesystem | None = None,
    active_halt: EmergencyRow | None = None,
    **training: object,
) -> RunUnderTest:
    """Returns a run that has not been started, without automatic rollbacks and checkpoints unless `sections` say so.

    `files` is the disk of its checkpoints, `active_halt` is a HALT that was active when the run was interrupted.
    """
    name = job if ":" in job else f"support.jobs:{job}"
    place = Path(tempfile.mkdtemp(prefix="tolaria-test-"))
    chosen: dict[str, Any] = {
        "rollback": {"automatic": False},
        "checkpoint": {"every_epochs": 0},
        "state": {"dir": str(place / "state")},
        **(sections or {}),
    }
    settings = Settings(
        training=TrainingSettings.model_validate({"job": name, "device": "cpu", "threads": 1, **training}),
        control=control or ControlSettings(boundary_budget_ms=2000, tamiyo_budget_ms=1000),
        **chosen,
    )
    # In a thread, as the service builds it before there is an event loop: jobs read files and import modules.
    with ThreadPoolExecutor(1) as pool:
        built = pool.submit(build, settings).result()
        board = pool.submit(SignalBoard.create, place / "board", "run").result()
        open_it = partial(open_storage, run_id="run", retention=retention_of(settings.checkpoint), files=files)
        storage = pool.submit(open_it, Path(settings.state.dir)).result()
    foundation = Foundation(
        settings=settings,
        build=built,
        board=board,
        storage=storage,
        writer=CheckpointWriter(storage.checkpoints),
        run=RunRow("run", 0, settings.training.job),
        active_halt=active_halt,
        metrics=Metrics(),
        emitter=RecordingEmitter(),
        log_context=LogContext(),
    )
    core = Core(foundation)
    return RunUnderTest(core, wire(core, peers.connected() if settings.control.enabled else None), built)


@asynccontextmanager
async def running(run: RunUnderTest) -> AsyncIterator[RunUnderTest]:
    """Runs it while the block runs; at the end the lane's thread must have ended."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch_board, run.board, run.safety.controller)
        tasks.start_soon(run.service.serve, run.core, tasks)
        try:
            yield run
        finally:
            with anyio.CancelScope(shield=True):
                ended = await anyio.to_thread.run_sync(run.core.lane.close, 10.0)
            tasks.cancel_scope.cancel()
    await anyio.to_thread.run_sync(_remove, run.core.foundation)
    assert ended


def _remove(foundation: Foundation) -> None:
    foundation.board.close(unlink=True)
    with foundation.writer:
        pass
    foundation.storage.journal.close()
    shutil.rmtree(foundation.board.path.parent)


async def train_to(run: RunUnderTest, step: int, *, passes_each: int = 1) -> None:
    """Trains to exactly that step and pauses the run there; its job waits in each pass to be released."""
    if run.state == "PAUSED":
        await run.run.resume("on")
    for _ in range((step - run.status.global_step) * passes_each - 1):
        await anyio.to_thread.run_sync(run.job.entered.acquire)
        run.job.passes.release()
    await anyio.to_thread.run_sync(run.job.entered.acquire)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.run.pause, "at the step")
        await run.until(lambda: run.state == "PAUSED")
        run.job.passes.release()
    assert run.status.global_step == step
