"""Builds a lane from the settings: job, model, optimizer, data, and a first forward pass that finds mistakes early."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import nn

from tolaria.config import Settings
from tolaria.errors import (
    BrokenJobError,
    ConfigurationError,
    EmptyDatasetError,
    JobError,
    LossShapeError,
    OptimizationError,
    ScheduleError,
    SeedError,
    StateUnsupportedError,
)
from tolaria.images import StateImage
from tolaria.jobs import BatchCursor, JobContext, TrainingJob, build_job
from tolaria.lane.device import choose_device, on_device, seed_everything
from tolaria.lane.fast_paths import FastPaths
from tolaria.lane.lane import LaneHeartbeat, ThreadLane
from tolaria.lane.messages import LaneReady, Restored
from tolaria.lane.profiling import LaneProfiler
from tolaria.lane.seed_training import SeedTraining
from tolaria.lane.snapshot_manager import SnapshotManager
from tolaria.lane.step import checked_losses
from tolaria.lane.train_module import TrainModule
from tolaria.state.encoding import capture_rngs, restore_rngs
from tolaria.values.training import Evaluation

_MIB: Final = 2**20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BuiltLane:
    """A lane that has been built but not started. Once `lane` has been called, only its thread may use the module."""

    settings: Settings
    module: TrainModule
    snapshots: SnapshotManager

    @property
    def ready(self) -> LaneReady:
        """What has been built; after `resume`, with the resumed position."""
        module, seeds = self.module, self.module.seeds
        paths = module.fast_paths
        return LaneReady(
            position=module.position,
            progress=module.progress,
            steps_per_epoch=module.steps_per_epoch,
            device=str(module.device),
            torch_version=torch.__version__,
            fast_paths=paths.descriptions,
            fast_paths_running=tuple(paths.running),
            fast_path_failures=tuple((name, paths.fallbacks[name]) for name in paths.failed),
            learning_rates=seeds.controller.learning_rates(),
            adjustments=seeds.controller.adjustments,
            seeds=tuple(seeds.topology.states(module.global_step)),
            losses=json.dumps(module.losses.state_dict()),
        )

    def resume(self, image: StateImage) -> Restored:
        """Restores a checkpoint of an earlier process; raises as `SnapshotManager.restore_image` does."""
        return self.snapshots.restore_image(image)

    def lane(self, heartbeat: LaneHeartbeat, traces_dir: Path) -> ThreadLane:
        """Returns the lane, in a thread that has not been started."""
        bytes_max = self.settings.profiler.traces_mb * _MIB
        return ThreadLane(
            self.module,
            self.snapshots,
            profiler=LaneProfiler(traces_dir, bytes_max=bytes_max, resting=heartbeat.lane_rests),
            heartbeat=heartbeat,
            threads=self.settings.training.threads,
        )


def build(settings: Settings) -> BuiltLane:
    """Builds the job and everything that it provides, and tries one forward pass. Seeds all generators.

    Raises:
        JobError: names the method that failed, or returned something invalid.
        ConfigurationError: the device does not exist, or the schedule does not fit the run.
    """
    training = settings.training
    device = choose_device(training.device)
    if training.deterministic:
        torch.use_deterministic_algorithms(mode=True)  # an operation without a deterministic kernel raises when used
        torch.backends.cudnn.benchmark = False
    seed_everything(training.seed)
    context = JobContext(training.seed, device, training.options)
    job = build_job(training.job, context)
    job_name = f"training.job {training.job!r}"
    try:
        module = _build_module(settings, job, context)
        return BuiltLane(settings, module, SnapshotManager(module, settings.rollback))
    except ScheduleError as error:
        raise ConfigurationError([f"optimizer: {error}"]) from None
    except StateUnsupportedError as error:
        raise BrokenJobError(f"{job_name}: its model cannot be rolled back: {error}") from None
    except (BrokenJobError, EmptyDatasetError, LossShapeError) as error:
        raise type(error)(f"{job_name}: {error}") from error.__cause__
    except (OptimizationError, SeedError) as error:
        raise BrokenJobError(f"{job_name}: {error}") from None


def _build_module(settings: Settings, job: TrainingJob, context: JobContext) -> TrainModule:
    training, device = settings.training, context.device
    model = _call("build_model", job.build_model, nn.Module).to(device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BrokenJobError("its model has no parameter that can be trained")
    optimizer = _call("build_optimizer", lambda: job.build_optimizer(model), torch.optim.Optimizer)
    cursor = _call("training_data", job.training_data, BatchCursor)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise BrokenJobError(
            f"{type(optimizer).__name__} evaluates the loss several times in a step, by a closure, but "
            "gradients are merged only once a step"
        )
    batches = _call("training_data", lambda: cursor.batches_per_epoch)
    fast_paths = FastPaths(settings.fastpaths, device, deterministic=training.deterministic)
    seeds = SeedTraining(model, optimizer, settings, training.epochs * -(-batches // training.accumulate))
    fast_paths.fuse(seeds.manager)
    module = TrainModule(
        job, model, cursor, device, seeds=seeds, fast_paths=fast_paths, settings=settings, announced=context.announced
    )
    _try_forward(module)
    fast_paths.compile(model, lambda: _try_forward(module, backward=True))
    return module


def _call(method: str, call: Callable[[], T], kind: type[Any] = object) -> T:
    """Calls a method of the job, which has to return a `kind`. Raises BrokenJobError with the method's name."""
    try:
        made = call()
    except JobError:
        raise
    except (Exception, SystemExit) as error:
        raise BrokenJobError(f"{method}() raised {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise BrokenJobError(f"{method}() must return a {kind.__name__}, got a {type(made).__name__}")
    return made


def _try_forward(module: TrainModule, *, backward: bool = False) -> None:
    """Trains on the first batch without a step, and evaluates. Restores generators, buffers, gradients and cursor."""
    job, model, cursor, rngs = module.job, module.model, module.cursor, capture_rngs()
    module.save_buffers()
    try:
        place = _call("training_data", cursor.state_dict)
        _call("training_data", lambda: cursor.begin_epoch(1))
        batch = _call("training_data", cursor.next_batch)
        if batch is None or cursor.batches_per_epoch < 1:
            raise EmptyDatasetError("its training data holds no batch")
        batch = on_device(batch, module.device)
        model.train()
        with module.fast_paths.autocast():
            losses = _call("losses", lambda: checked_losses(job, model, batch, ()))
        if backward:
            _call("backward", lambda: torch.autograd.backward(list(losses.values())))
        validation = _call("validation_batches", lambda: next(iter(job.validation_batches()), None))
        if validation is None:
            raise EmptyDatasetError("its validation data holds no batch")
        validation = on_device(validation, module.device)
        model.eval()
        with torch.no_grad():
            _call("evaluate", lambda: job.evaluate(model, validation), Evaluation)
        _call("training_data", lambda: cursor.load_state_dict(place))
    finally:
        model.train()
        module.discard_pass()
        module.announced.clear()
        restore_rngs(*rngs)
