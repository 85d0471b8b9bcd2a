"""Real lanes for tests: a bare module, a lane driven on the test's thread, and a lane in a separate thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SeedLifecycleStage
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from tolaria.config import Settings, TrainingSettings
from tolaria.images import Lease, StateImage
from tolaria.lane.build import BuiltLane, build
from tolaria.lane.commands import CommandExecutor, QueuedCommand
from tolaria.lane.lane import ThreadLane
from tolaria.lane.messages import (
    BoundaryCommand,
    CaptureImage,
    Command,
    CommandDone,
    Event,
    ImageCaptured,
    Restore,
    Restored,
    Stop,
)
from tolaria.lane.profiling import LaneProfiler
from tolaria.lane.step import train_step
from tolaria.lane.train_module import TrainModule
from tolaria.signals.layout import LanePhase

E = TypeVar("E", bound=Event)


class NoHeartbeat:
    """A heartbeat that only counts its beats, and records the phases that were entered and the ordinary steps."""

    def __init__(self) -> None:
        self.beats = 0
        self.phases: list[LanePhase] = []
        self.steps = 0

    def lane_beat(self) -> None:
        self.beats += 1

    def lane_works(self) -> AbstractContextManager[None]:
        return nullcontext()

    def lane_rests(self) -> AbstractContextManager[None]:
        return nullcontext()

    def lane_phase(self, phase: LanePhase) -> AbstractContextManager[None]:
        self.phases.append(phase)
        return nullcontext()

    def lane_batch(self, epoch: int, place: int) -> None:
        del epoch, place

    def lane_step(self, duration_s: float) -> None:
        del duration_s
        self.steps += 1


def built(job: str = "TinyJob", *, sections: Mapping[str, Any] | None = None, **training: object) -> BuiltLane:
    """A built lane of a job in `support.jobs`, on the CPU; `training` are settings of that section."""
    fields = {"job": job if ":" in job else f"support.jobs:{job}", "device": "cpu", "threads": 1, **training}
    return build(Settings(training=TrainingSettings.model_validate(fields), **(sections or {})))


def new_module(job: str = "TinyJob", *, sections: Mapping[str, Any] | None = None, **training: object) -> TrainModule:
    """A module at the start of its first epoch; its `progress` has not begun."""
    module = built(job, sections=sections, **training).module
    module.cursor.begin_epoch(1)
    module.model.train()
    return module


def proceed() -> bool:
    """Continues every step."""
    return True


def seed(
    stage: SeedLifecycleStage.ValueType = SEED_STAGE_BLENDING, *, begin: int = 0, steps: int = 8
) -> tuple[SeedState, ...]:
    """One residual MLP in this stage, whose alpha goes from 0 to 1."""
    alpha = AlphaSchedule(start=0.0, end=1.0, begin_step=begin, duration_steps=steps)
    return (SeedState(seed_id="a", stage=stage, blueprint_id="residual_mlp", slot="middle", alpha=alpha),)


class DrivenLane:
    """A lane that trains and executes commands on the test's thread, when the test calls it."""

    def __init__(self, lane: BuiltLane) -> None:
        self.module = lane.module
        self.snapshots = lane.snapshots
        self.losses: dict[int, float] = {}
        """Losses by global step; for a repeated step, the last one."""
        profiler = LaneProfiler(Path("unused"), bytes_max=1, resting=nullcontext)
        self._executor = CommandExecutor(lane.module, lane.snapshots, profiler)
        self.images, self.gate = self._executor.images, self._executor.gate
        self._ids = 0

    def train_to(self, global_step: int, commands: Mapping[int, BoundaryCommand] | None = None) -> None:
        """Trains up to that step; `commands` are executed at the step boundary of their step."""
        module, commands = self.module, commands or {}
        while module.global_step < global_step:
            module.begin_epoch()
            if (command := commands.get(module.global_step)) is not None:
                assert self.execute(command).failure is None
            step = train_step(module, proceed)
            if step is None:
                module.progress = module.progress.ended()
                continue
            self.losses[step.global_step] = step.loss
            if module.seeds.advance(module.global_step) is not None:
                module.refresh()

    def execute(self, command: BoundaryCommand) -> CommandDone:
        """Executes a command now."""
        self._ids += 1
        return self._executor.execute(QueuedCommand(self._ids, command))

    def capture(self) -> Lease:
        """Captures the state now, as a snapshot in the ring if it has room, and returns the lease."""
        result = self.execute(CaptureImage()).result
        assert isinstance(result, ImageCaptured)
        return self.images.take(result.image_id)

    def snapshot(self) -> None:
        """Takes a snapshot now."""
        self.capture().release()

    def restore(self, step: int, image: StateImage | None = None) -> Restored:
        """Restores the snapshot of that step, or an image."""
        image_id = 0 if image is None else self.images.put(image)
        done = self.execute(Restore(step, time.monotonic() + 60, image_id))
        if done.failure is not None:
            raise done.failure.error()
        assert isinstance(done.result, Restored)
        return done.result

    @property
    def digest(self) -> str:
        """Digest of the live state."""
        return self.snapshots.state.fingerprint().total


def driven(
    job: str = "RandomisedJob", *, sections: Mapping[str, Any] | None = None, accumulate: int = 1, **options: str
) -> DrivenLane:
    """A driven lane; equal arguments give equal runs."""
    torch.set_num_threads(1)
    return DrivenLane(
        built(
            job,
            sections=sections,
            deterministic=True,
            accumulate=accumulate,
            options={"optimizer": "SGD", **options},
        )
    )


class RunningLane:
    """A lane in a separate thread, whose events the test waits for."""

    def __init__(self, lane: ThreadLane, module: TrainModule) -> None:
        self.lane = lane
        self.module = module
        self.events: list[Event] = []
        """All events so far, in order."""
        self._changed = threading.Condition()
        self._ids = 0
        lane.start(self._take)

    def send(self, command: Command) -> int:
        """Sends a command and returns its id."""
        self._ids += 1
        self.lane.send(self._ids, command)
        return self._ids

    def wait_for(self, kind: type[E], *, number: int = 1, timeout_s: float = 180.0) -> E:
        """Waits for the event of that type and number, counted from 1."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.all_of(kind)) >= number, timeout_s), self.events[-5:]
            return self.all_of(kind)[number - 1]

    def done(self, command_id: int, *, timeout_s: float = 180.0) -> CommandDone:
        """Waits for the event of that command."""

        def found() -> CommandDone | None:
            return next((done for done in self.all_of(CommandDone) if done.command_id == command_id), None)

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, timeout_s), self.events[-5:]
            done = found()
        assert done is not None
        return done

    def all_of(self, kind: type[E]) -> Sequence[E]:
        """The events of a type so far."""
        return [event for event in self.events if isinstance(event, kind)]

    def _take(self) -> None:
        with self._changed:
            self.events.extend(self.lane.take_events())
            self._changed.notify_all()


@contextmanager
def running(lane: BuiltLane, traces_dir: Path = Path("unused")) -> Iterator[RunningLane]:
    """Runs a built lane in its thread; at the end the thread must have ended."""
    run = RunningLane(lane.lane(NoHeartbeat(), traces_dir), lane.module)
    try:
        yield run
    finally:
        run.send(Stop())
        assert run.lane.close(20.0)
