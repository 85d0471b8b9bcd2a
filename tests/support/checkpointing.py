"""Checkpointing with real storage and a real writer, a scripted lane, and a disk that fails on request."""

from __future__ import annotations

import errno
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from leyline.v1.state_pb2 import HardwareContext
from support.lanes import FakeLane, small_image, started_client
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import Retention
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import CheckpointSettings
from tolaria.errors import TolariaError
from tolaria.filesystem import Filesystem
from tolaria.images import Lease
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import CheckpointRow
from tolaria.lane.messages import CaptureImage, CommandDone, EpochDone, Event, ImageCaptured
from tolaria.resilience.breaker import Breaker
from tolaria.run import checkpointing
from tolaria.run.checkpointing import Checkpointing
from tolaria.run.observers import RunObserver
from tolaria.run.restore_points import RestorePoints
from tolaria.run.run_state import Lifecycle
from tolaria.values.evaluation import Evaluation


class Disk(Filesystem):
    """A disk that is full while `full` is set, and that creates no directory until `gate` is set."""

    def __init__(self) -> None:
        self.full = False
        self.gate = threading.Event()
        self.gate.set()

    def make_directory(self, path: Path) -> None:
        assert self.gate.wait(180)
        super().make_directory(path)

    def write(self, descriptor: int, content: memoryview) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(descriptor, content)


class RecordingLifecycle(Lifecycle):
    """Records when checkpointing holds and resumes the run."""

    def __init__(self) -> None:
        self.held = False
        self.log: list[tuple[str, str]] = []
        self.changes = 0

    @property
    def actions(self) -> list[str]:
        """The recorded actions, without reasons."""
        return [action for action, _ in self.log]

    def hold_if_training(self, reason: str) -> bool:
        """Holds the run unless it is held already."""
        if self.held:
            return False
        self.log.append(("hold", reason))
        self.held = True
        return True

    def resume_if_held_for(self, reason: str) -> None:
        """Resumes the run."""
        self.log.append(("resume", reason))
        self.held = False

    def changed(self) -> None:
        """Counts the notifications of status changes."""
        self.changes += 1


class CheckpointObserver(RunObserver):
    """Records what it observes."""

    def __init__(self) -> None:
        self.written: list[CheckpointRow] = []
        self.failed: list[tuple[int, str, str]] = []
        self.stalled: list[int] = []

    def on_checkpoint_written(self, row: CheckpointRow, duration_s: float) -> None:
        """Records the row."""
        assert duration_s >= 0
        self.written.append(row)

    def on_checkpoint_failed(self, step: int, stage: str, reason: str) -> None:
        """Records the failure."""
        self.failed.append((step, stage, reason))

    def on_checkpoint_stalled(self, step: int, stalled_s: float) -> None:
        """Records the step."""
        self.stalled.append(step)


class CheckpointingParts:
    """Checkpointing and its collaborators. Its sleeps end when the test calls `wake`. Create it on the event loop."""

    def __init__(self, storage: Storage, disk: Disk, *, from_step: int, settings: CheckpointSettings) -> None:
        self.storage, self.disk = storage, disk
        self.step = 0
        self.refusal: TolariaError | None = None
        self.leases = 0
        self.lane = FakeLane({CaptureImage: lambda _command: self.refusal or self.capture()})
        self.writer = CheckpointWriter(storage.checkpoints)
        self.now_s = 0.0
        self.breaker = Breaker("checkpoint", clock=lambda: self.now_s)
        self.run = RecordingLifecycle()
        self.observer = CheckpointObserver()
        self.slept_s: list[float] = []
        self._awake = anyio.Event()
        row = CheckpointRow("resumed", 1, "run", from_step, 1, 1, "d", None)
        self.points = RestorePoints(resumed=row if from_step else None)
        self.checkpointing = Checkpointing(
            settings,
            started_client(self.lane, self._apply),
            self.writer,
            lifecycle=self.run,
            breaker=self.breaker,
            observers=self.observer,
            journal=AsyncJournal(storage.journal, "run"),
            points=self.points,
        )

    @property
    def captures(self) -> int:
        """Number of images requested from the lane."""
        return len(self.lane.sent_of(CaptureImage))

    def lease(self) -> Lease:
        """A leased image of the current step; `leases` counts those that have not been released."""
        self.leases += 1
        return Lease(small_image(self.step), self._released)

    def capture(self) -> ImageCaptured:
        """The lane's answer with a leased image of the current step."""
        return self.lane.captured(self.lease())

    async def sleep(self, seconds: float) -> None:
        """Sleeps until the test wakes it."""
        self.slept_s.append(seconds)
        await self._awake.wait()

    def wake(self) -> None:
        """Ends the current sleep."""
        self._awake.set()
        self._awake = anyio.Event()

    async def until_idle(self, sleeps: int = 0) -> None:
        """Waits until there have been `sleeps` sleeps and no checkpoint is in progress."""
        await anyio.wait_all_tasks_blocked()
        await self.until_asleep(sleeps)
        with anyio.fail_after(180):
            while len(self.observer.written) + len(self.observer.failed) < self.captures:
                await anyio.sleep(0.001)
        await anyio.wait_all_tasks_blocked()

    async def until_asleep(self, times: int) -> None:
        """Waits until there have been `times` sleeps."""
        with anyio.fail_after(180):
            while len(self.slept_s) < times:
                await anyio.sleep(0.001)

    async def until_writing(self) -> None:
        """Waits until the writer holds a leased image that it has not written yet."""
        with anyio.fail_after(180):
            while not self.leases or len(self.lane.images):
                await anyio.sleep(0.001)

    async def rows(self) -> list[CheckpointRow]:
        """The committed checkpoints, oldest first."""
        return list(await anyio.to_thread.run_sync(self.storage.checkpoints.restore_points))

    async def steps(self) -> list[int]:
        """The steps of the committed checkpoints."""
        return [row.global_step for row in await self.rows()]

    def _released(self) -> None:
        self.leases -= 1

    def _apply(self, event: Event) -> None:
        if isinstance(event, CommandDone) and isinstance(event.result, ImageCaptured):
            self.checkpointing.on_image_captured(event.result.image_id, event.global_step)


class CheckpointingFactory:
    """Creates parts and closes them."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._monkeypatch = monkeypatch
        self._made: list[CheckpointingParts] = []

    async def __call__(self, *, from_step: int = 0, **settings: object) -> CheckpointingParts:
        """Creates parts with these settings."""
        disk = Disk()
        storage = await anyio.to_thread.run_sync(self._open, disk)
        chosen = CheckpointSettings.model_validate(settings)
        parts = CheckpointingParts(storage, disk, from_step=from_step, settings=chosen)
        self._made.append(parts)
        self._monkeypatch.setattr(checkpointing, "sleep", parts.sleep)
        return parts

    def close(self) -> None:
        """Closes writers and journals."""
        for parts in self._made:
            parts.disk.gate.set()
            assert parts.writer.close(20.0)
            parts.storage.journal.close()

    def _open(self, disk: Disk) -> Storage:
        return open_storage(self._directory, run_id="run", retention=Retention(last=100, best="highest"), files=disk)


@asynccontextmanager
async def serving(parts: CheckpointingParts) -> AsyncIterator[None]:
    """Runs the checkpointing task while the block runs."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(parts.checkpointing.serve)
        yield
        tasks.cancel_scope.cancel()


def epoch_done(step: int, epoch: int = 1, *, samples: int = 100) -> EpochDone:
    """An epoch with accuracy 0.5 and loss 2.0; both are NaN without samples."""
    return EpochDone(
        epoch=epoch,
        global_step=step,
        evaluation=Evaluation(2.0 * samples, samples // 2, samples),
        steps_s=1.0,
        finished_at_s=0.0,
        learning_rates={},
        momentum=0.0,
        hardware=HardwareContext(),
    )
