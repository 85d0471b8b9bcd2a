"""A checkpoint desk with real storage, ring and writer, and a disk that fails when told."""

from __future__ import annotations

import errno
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from tolaria.checkpoint.retention import Retention
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import CheckpointSettings
from tolaria.errors import TolariaError
from tolaria.filesystem import Filesystem
from tolaria.images.pool import Lease
from tolaria.journal.rows import CheckpointRow
from tolaria.resilience.breaker import Breaker
from tolaria.state.snapshots import SnapshotRing
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.metrics import Metrics
from tolaria.training.recovery.checkpoints import (
    CheckpointDesk,
    DeskTools,
    Evaluation,
)
from tolaria.values.training import Position

if TYPE_CHECKING:
    from faults.small_training import Training


class Disk(Filesystem):
    """Full when told, or so slow that nothing is made before the gate opens."""

    def __init__(self) -> None:
        self.full = False
        self.gate = threading.Event()
        self.gate.set()

    def make_directory(self, path: Path) -> None:
        assert self.gate.wait(20)
        super().make_directory(path)

    def write(self, descriptor: int, content: memoryview) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(descriptor, content)


class Room:
    """A desk with real storage, ring and writer; in place of sleeping it waits until the test lets it go on."""

    def __init__(self, training: Training, directory: Path, settings: CheckpointSettings) -> None:
        self.training = training
        self.disk = Disk()
        self.storage: Storage = open_storage(
            directory, run_id="run", retention=Retention(last=100, best="highest"), files=self.disk
        )
        self.cache = SnapshotRing(bytes_max=2**28, entries_max=8, seal=False)
        self.writer = CheckpointWriter(self.storage.checkpoints)
        self.metrics, self.emitter = Metrics(), Emitter()
        self.now_s = 0.0
        self.breaker = Breaker("checkpoint", clock=lambda: self.now_s)
        self.log: list[tuple[str, str]] = []
        self.refusal: TolariaError | OSError | None = None
        self.kept = 0
        self.standing = False
        self.slept_s: list[float] = []
        self.morning = anyio.Event()
        tools = DeskTools(
            writer=self.writer,
            keep=self.keep,
            hold=self.hold,
            go_on=self.go_on,
            breaker=self.breaker,
            metrics=self.metrics,
            emitter=self.emitter,
        )
        self.desk = CheckpointDesk(
            settings,
            tools,
            changed=lambda: self.log.append(("failing", self.desk.failing)),
            clock=lambda: self.now_s,
            sleep=self.sleep,
        )

    def hold(self, reason: str) -> bool:
        if self.standing:
            return False
        self.log.append(("hold", reason))
        self.standing = True
        return True

    def go_on(self, reason: str) -> None:
        self.log.append(("go_on", reason))
        self.standing = False

    async def keep(self, on_kept: Callable[[], None]) -> Lease:
        self.kept += 1
        if self.refusal is not None:
            raise self.refusal
        lease = await anyio.to_thread.run_sync(self.leased)
        on_kept()
        return lease

    def leased(self) -> Lease:
        self.cache.capture(self.training.state())
        lease = self.cache.hold(self.training.position.global_step)
        assert lease is not None
        return lease

    async def sleep(self, time_s: float) -> None:
        self.slept_s.append(time_s)
        await self.morning.wait()

    def wake(self) -> None:
        """End the sleep that goes on."""
        self.morning.set()
        self.morning = anyio.Event()

    def at(self, step: int) -> None:
        """Training has got to this step."""
        self.training.position = Position(step, 1)

    async def quiet(self, sleeps: int = 0) -> None:
        """Until the desk has nothing to do at present, having gone to sleep so many times."""
        await anyio.wait_all_tasks_blocked()
        await self.asleep(sleeps)
        with anyio.fail_after(20):
            while self.desk._turn.locked():
                await anyio.sleep(0.001)
        await anyio.wait_all_tasks_blocked()

    async def asleep(self, times: int) -> None:
        """Until the desk, or who waits there, has gone to sleep so many times."""
        with anyio.fail_after(20):
            while len(self.slept_s) < times:
                await anyio.sleep(0.001)

    async def handed_over(self) -> None:
        """Until the writer has an image that it has not done with."""
        with anyio.fail_after(20):
            while not self.writer.pending:
                await anyio.sleep(0.001)

    async def rows(self) -> list[CheckpointRow]:
        return list(await anyio.to_thread.run_sync(self.storage.checkpoints.restore_points))

    async def steps(self) -> list[int]:
        return [row.global_step for row in await self.rows()]

    def words(self) -> list[str]:
        return [word for word, _ in self.log]

    def value(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"tolaria.checkpoint.{name}")


class Rooms:
    """Makes rooms and closes them."""

    def __init__(self, training: Training, directory: Path) -> None:
        self.training = training
        self.directory = directory
        self.made: list[Room] = []

    async def __call__(self, **settings: object) -> Room:
        room = await anyio.to_thread.run_sync(
            Room, self.training, self.directory, CheckpointSettings.model_validate(settings)
        )
        self.made.append(room)
        return room


@asynccontextmanager
async def serving(room: Room) -> AsyncIterator[None]:
    """While the block runs, the desk's task does."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(room.desk.serve)
        yield
        tasks.cancel_scope.cancel()


def evaluation(step: int, epoch: int = 1, accuracy: float = 0.5, loss: float = 2.0) -> Evaluation:
    """What validation found."""
    return Evaluation(step, epoch, accuracy, loss)
