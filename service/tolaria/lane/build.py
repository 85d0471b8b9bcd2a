"""Builds a lane from the settings: job, model, optimizer, data, and a first forward pass that finds mistakes early."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

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
from tolaria.images.image import StateImage
from tolaria.jobs import Batch, BatchCursor, JobContext, build_job
from tolaria.lane.device import choose_device, on_device, seed_everything, use_deterministic_kernels
from tolaria.lane.fast_paths import FastPaths
from tolaria.lane.gradient_merge import GradientMerger
from tolaria.lane.lane import LaneHeartbeat, ThreadLane
from tolaria.lane.messages import LaneReady, Restored
from tolaria.lane.profiling import LaneProfiler
from tolaria.lane.seed_training import SeedTraining
from tolaria.lane.snapshot_manager import SnapshotManager
from tolaria.lane.step import checked_losses
from tolaria.lane.train_module import TrainModule
from tolaria.values.training import Evaluation

_MIB: Final = 2**20

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class LaneBuild:
    """A lane that has been built and not started. From `lane` on the module belongs to the lane's thread."""

    settings: Settings
    module: TrainModule
    snapshots: SnapshotManager

    @property
    def ready(self) -> LaneReady:
        """What has been built, after `resume` with the resumed position."""
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
        )

    def resume(self, image: StateImage) -> Restored:
        """Restores a checkpoint of an earlier process.

        Raises:
            RollbackError, SeedError, OptimizationError: the image does not fit; nothing has changed.
        """
        return self.snapshots.restore_image(image)

    def lane(self, heartbeat: LaneHeartbeat, traces_dir: Path) -> ThreadLane:
        """Returns the lane, in a thread that has not been started.

        Args:
            heartbeat: records the lane's progress.
            traces_dir: of the traces of profiles.
        """
        traces_bytes_max = self.settings.profiler.traces_mb * _MIB
        return ThreadLane(
            self.module,
            self.snapshots,
            profiler=LaneProfiler(traces_dir, bytes_max=traces_bytes_max, resting=heartbeat.lane_rests),
            heartbeat=heartbeat,
            threads=self.settings.training.threads,
        )


def build(settings: Settings) -> LaneBuild:
    """Builds the job and everything that it provides, and tries one forward pass. Seeds all generators.

    Raises:
        JobError: names the method that failed, or returned something invalid.
        ConfigurationError: the device does not exist, or the schedule does not fit the run.
    """
    training = settings.training
    device = choose_device(training.device)
    if training.deterministic:
        use_deterministic_kernels()
    seed_everything(training.seed)
    job = build_job(training.job, JobContext(training.seed, device, training.options))
    model = _made(training.job, "build_model", job.build_model, nn.Module).to(device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BrokenJobError(f"training.job {training.job!r}: its model has no parameter that can be trained")
    optimizer = _made(training.job, "build_optimizer", lambda: job.build_optimizer(model), torch.optim.Optimizer)
    cursor = _made(training.job, "training_data", job.training_data, BatchCursor)
    _require_plain_step(training.job, optimizer)
    fast_paths = FastPaths(settings.fastpaths, device, deterministic=training.deterministic)
    seeds = _seed_training(settings, model, optimizer, cursor)
    fast_paths.fuse(seeds.manager)
    merger = GradientMerger(
        settings.gradients,
        isolation=settings.seeds.isolation,
        run_seed=training.seed,
        scope=seeds.gradient_scope(0),
    )
    module = TrainModule(
        job, model, cursor, device, seeds=seeds, merger=merger, fast_paths=fast_paths, settings=training
    )
    _try_forward(training.job, module)
    fast_paths.compile(model, lambda: _try_forward(training.job, module, backward=True))
    try:
        snapshots = SnapshotManager(module, settings.rollback)
    except StateUnsupportedError as error:
        raise BrokenJobError(f"training.job {training.job!r}: its model cannot be rolled back: {error}") from None
    return LaneBuild(settings, module, snapshots)


def _require_plain_step(job_name: str, optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise BrokenJobError(
            f"training.job {job_name!r}: {type(optimizer).__name__} evaluates the loss several times in a step, "
            "by a closure, which gradients merged once a step cannot serve"
        )


def _seed_training(
    settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer, cursor: BatchCursor
) -> SeedTraining:
    training = settings.training
    batches = _calling(training.job, "training_data", lambda: cursor.batches_per_epoch)
    try:
        return SeedTraining(
            model,
            optimizer,
            settings=settings.optimizer,
            seeds=settings.seeds,
            run_seed=training.seed,
            run_steps=training.epochs * -(-batches // training.accumulate),
        )
    except ScheduleError as error:
        raise ConfigurationError([f"optimizer: {error}"]) from None
    except (OptimizationError, SeedError) as error:
        raise BrokenJobError(f"training.job {training.job!r}: {error}") from None


def _made(job_name: str, method: str, make: Callable[[], Made], kind: type[Any]) -> Made:
    made = _calling(job_name, method, make)
    if not isinstance(made, kind):
        raise BrokenJobError(
            f"training.job {job_name!r}: {method}() must return a {kind.__name__}, got a {type(made).__name__}"
        )
    return made


def _calling(job_name: str, method: str, call: Callable[[], Made]) -> Made:
    try:
        return call()
    except LossShapeError as error:
        raise LossShapeError(f"training.job {job_name!r}: {error}") from None
    except JobError:
        raise
    except (Exception, SystemExit) as error:
        raise BrokenJobError(f"training.job {job_name!r}: {method}() raised {type(error).__name__}: {error}") from error


def _try_forward(job_name: str, module: TrainModule, *, backward: bool = False) -> None:
    """Tries a forward (and backward) pass of the first batch. Restores generators, buffers, gradients and cursor."""
    torch_rng, numpy_rng, python_rng = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    module.save_buffers()
    try:
        place = _calling(job_name, "training_data", module.cursor.state_dict)
        batch = _calling(job_name, "training_data", lambda: _first_batch(module.cursor))
        if batch is None or module.cursor.batches_per_epoch < 1:
            raise EmptyDatasetError(f"training.job {job_name!r}: its training data holds no batch")
        module.model.train()
        losses = _calling(job_name, "losses", lambda: _forward(module, batch))
        if backward:
            torch.autograd.backward(list(losses.values()))
        _try_evaluation(job_name, module)
        _calling(job_name, "training_data", lambda: module.cursor.load_state_dict(place))
    finally:
        module.model.train()
        module.clear_gradients()
        module.restore_buffers()
        torch.set_rng_state(torch_rng)
        np.random.set_state(numpy_rng)  # noqa: NPY002
        random.setstate(python_rng)


def _try_evaluation(job_name: str, module: TrainModule) -> None:
    batches = _calling(job_name, "validation_batches", module.job.validation_batches)
    batch = _calling(job_name, "validation_batches", lambda: next(iter(batches), None))
    if batch is None:
        raise EmptyDatasetError(f"training.job {job_name!r}: its validation data holds no batch")
    batch = on_device(batch, module.device)
    module.model.eval()
    with torch.no_grad():
        _made(job_name, "evaluate", lambda: module.job.evaluate(module.model, batch), Evaluation)


def _forward(module: TrainModule, batch: Batch) -> Mapping[str, Tensor]:
    with module.fast_paths.autocast():
        return checked_losses(module.job, module.model, on_device(batch, module.device), ())


def _first_batch(cursor: BatchCursor) -> Batch | None:
    cursor.begin_epoch(1)
    return cursor.next_batch()
