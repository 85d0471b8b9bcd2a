"""A whole training loop around a tiny job, with peers that the test scripts."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from leyline.v1.admin_service_pb2 import RunState
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.config import ControlSettings, Settings, TrainingSettings
from tolaria.emergency.supervision import watch_board
from tolaria.peers.kasmina import Applied
from tolaria.rollback import CheckpointWriter, EmergencyRow, Filesystem, Retention, RunRow, open_storage
from tolaria.rollback.participants import Seat
from tolaria.service.parts import Ground, Parts, new_loop
from tolaria.signals import SignalBoard
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.logging import LogContext
from tolaria.telemetry.metrics import Metrics
from tolaria.training.loop import TrainingLoop
from tolaria.training.progress import Progress
from tolaria.training.recovery.keeper import SnapshotKeeper
from tolaria.training.rig import build_rig

Answer = Callable[[SystemStatePacket], Awaitable[AdaptationCommand | None]]


async def no_change(_state: SystemStatePacket) -> AdaptationCommand | None:
    """The controller that is always content."""
    return None


class FakePeers:
    """Controller and executor in one; `answer` and `export` are the test's."""

    def __init__(self, answer: Answer = no_change, seeds: list[SeedState] | None = None) -> None:
        self.answer = answer
        self.seeds = seeds or []
        self.states: list[SystemStatePacket] = []
        self.step_states: list[SystemStatePacket] = []
        self.applied: list[AdaptationCommand] = []
        self.refusals: list[tuple[str, str]] = []
        self.takes = True
        self.seats: list[Seat] = []

    async def evaluate_epoch(self, state: SystemStatePacket) -> AdaptationCommand | None:
        """What the test scripted."""
        self.states.append(state)
        return await self.answer(state)

    async def evaluate_step(self, state: SystemStatePacket) -> AdaptationCommand | None:
        """Likewise, between epochs."""
        self.step_states.append(state)
        return await self.answer(state)

    async def apply(self, command: AdaptationCommand, state: SystemStatePacket) -> Applied:
        """Take every command, unless the test says otherwise."""
        self.applied.append(command)
        return Applied(applied=self.takes, detail="germinated" if self.takes else "no room", seeds=self.seeds)

    async def export_seeds(self, state: SystemStatePacket, refusals: Sequence[tuple[str, str]] = ()) -> list[SeedState]:
        """The scripted seeds."""
        self.refusals = list(refusals)
        return self.seeds


class RunUnderTest:
    """The loop and all that the test looks at."""

    def __init__(self, loop: TrainingLoop, parts: Parts, *, job: Any) -> None:
        self.loop = loop
        self.parts = parts
        self.progress = parts.progress
        self.guardian, self.safeguards = parts.guardian, parts.guardian.safeguards
        self.board = parts.ground.board
        self.metrics = parts.ground.metrics
        self.emitter = parts.ground.emitter
        self.rig = parts.ground.rig
        self.job = job

    @property
    def state(self) -> str:
        """The run's state without its prefix."""
        return RunState.Name(self.progress.state).removeprefix("RUN_STATE_")

    @property
    def events(self) -> list[str]:
        """Names of the events so far."""
        return [event.description for event in self.emitter.recent]

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something to become true, ten seconds at most."""
        with anyio.fail_after(10):
            while not holds():
                await anyio.sleep(0.002)


def new_run(
    peers: FakePeers,
    *,
    job: str = "TinyJob",
    control: ControlSettings | None = None,
    sections: dict[str, object] | None = None,
    files: Filesystem | None = None,
    standing: EmergencyRow | None = None,
    **training: object,
) -> RunUnderTest:
    """A run that has not been started. Without automatic rollbacks and checkpoints unless `sections` asks for them.

    `files` is the disk that its checkpoints are on, `standing` a halt that it comes with.
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
    # In a thread, as the service builds it before there is a loop: jobs read files and import modules.
    with ThreadPoolExecutor(1) as pool:
        rig = pool.submit(build_rig, settings).result()
        keeper = pool.submit(SnapshotKeeper, rig, settings.rollback).result()
        board = pool.submit(SignalBoard.create, place / "board", "run").result()
        open_it = partial(open_storage, run_id="run", retention=Retention(), files=files)
        storage = pool.submit(open_it, Path(settings.state.dir)).result()
    progress = Progress(
        "run", settings.training.job, "test", settings.training.epochs, rig.steps_per_epoch, time.monotonic()
    )
    ground = Ground(
        settings=settings,
        rig=rig,
        keeper=keeper,
        progress=progress,
        board=board,
        metrics=Metrics(),
        emitter=Emitter(),
        log_context=LogContext(),
        storage=storage,
        run=RunRow("run", 0, settings.training.job),
        standing=standing,
        writer=CheckpointWriter(storage.checkpoints),
    )
    parts = Parts(ground)
    loop = new_loop(parts, controller=peers, executor=peers, seats=peers.seats)
    return RunUnderTest(loop, parts, job=rig.job)


@asynccontextmanager
async def running(run: RunUnderTest) -> AsyncIterator[RunUnderTest]:
    """The run and its consultations going on; at the end the lane's thread must be gone."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch_board, run.board, run.guardian.controller)
        tasks.start_soon(run.loop.consultant.serve)
        tasks.start_soon(run.loop.rollbacks.serve)
        tasks.start_soon(run.loop.checkpoints.serve)
        tasks.start_soon(run.parts.archive.serve)
        tasks.start_soon(run.loop.run)
        try:
            yield run
        finally:
            with anyio.CancelScope(shield=True):
                ended = await anyio.to_thread.run_sync(run.loop.close, 10.0)
            tasks.cancel_scope.cancel()
    await anyio.to_thread.run_sync(_remove, run.parts.ground)
    assert ended


def _remove(ground: Ground) -> None:
    ground.board.close(unlink=True)
    with ground.writer:
        pass
    ground.storage.journal.close()
    shutil.rmtree(ground.board.path.parent)
