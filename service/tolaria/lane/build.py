"""Builds a lane from the settings: job, model, optimizer, data, and a first look that finds mistakes early."""

from __future__ import annotations

import inspect
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from tolaria.config import Settings, require_extras
from tolaria.config.ranks import RankEnvironment
from tolaria.errors import (
    BrokenJobError,
    ConfigurationError,
    EmptyDatasetError,
    ExportError,
    LaneFailedError,
    LossShapeError,
    OptimizationError,
    RollbackError,
    ScheduleError,
    SeedError,
    StateUnsupportedError,
)
from tolaria.export.warm_start import warm_start
from tolaria.images import StateImage
from tolaria.jobs import BatchCursor, IntervalCursor, JobContext, RunView, TrainingJob, build_job
from tolaria.jobs.intervals import INTERVAL_STEPS
from tolaria.lane.commands import PageGate
from tolaria.lane.device import choose_device, seed_everything, usable_cores
from tolaria.lane.fast_paths import FastPaths
from tolaria.lane.first_look import first_look, lazy_names, materialise
from tolaria.lane.job_callbacks import JobCallbacks, callbacks_of
from tolaria.lane.job_output import call
from tolaria.lane.job_schedules import follow_schedule, schedule_notes, schedule_of
from tolaria.lane.lane import LaneHeartbeat, ThreadLane
from tolaria.lane.messages import LaneReady, Restored
from tolaria.lane.model_description import describe
from tolaria.lane.order import RestorePlan
from tolaria.lane.profiling import LaneProfiler
from tolaria.lane.seed_training import SeedTraining
from tolaria.lane.snapshot_manager import SnapshotManager
from tolaria.lane.train_module import TrainModule
from tolaria.ranks.group import Group
from tolaria.ranks.share import Share, SharingJob
from tolaria.ranks.stacks import STACKS_FILE
from tolaria.state.shared_memory import SharedMemory
from tolaria.values.optimization import ActiveAdjustment
from tolaria.values.training import RankInfo

if TYPE_CHECKING:
    from tolaria.lane.sharding import Sharding

_MIB: Final = 2**20


@dataclass(slots=True)
class BuiltLane:
    """A lane that has been built but not started. Once `lane` has been called, only its thread may use the module."""

    settings: Settings
    module: TrainModule
    snapshots: SnapshotManager
    notes: tuple[str, ...] = ()
    ranks: tuple[RankInfo, ...] = ()
    """Those that train the module together; empty for a process alone."""

    @property
    def rank(self) -> RankInfo:
        """This process."""
        group = self.module.group
        rank, node = 0 if group is None else group.rank, RankEnvironment.read().node
        return RankInfo(rank, platform.node(), os.getpid(), str(self.module.device), node)

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
            notes=self.notes,
            slots=seeds.topology.slots,
            ranks=self.ranks or (self.rank,),
            model=describe(module.model),
            schedule="" if (schedule := seeds.controller.job_schedule) is None else schedule.description,
            evaluates=module.evaluates,
        )

    @property
    def _threads(self) -> int:
        """Threads of a rank: its part of the processor's cores; 0 for a process alone."""
        group = self.module.group
        return 0 if group is None else max(1, usable_cores() // group.local_world)

    def resume(self, image: StateImage, decided: Sequence[ActiveAdjustment] = ()) -> Restored:
        """Restores a checkpoint of an earlier process, with the run's adjustments of learning rates, `decided`.

        Raises as `SnapshotManager.restore_image` does.
        """
        return self.snapshots.restore_image(image, decided=decided)

    def start_from(self, plan: RestorePlan, image: StateImage | None) -> None:
        """Restores what the plan says. Raises LaneFailedError if none of its snapshots can be restored.

        `image` is the checkpoint of the plan; raises as `resume_run` does.
        """
        module = self.module
        restored = any(self.snapshots.restore_digest(digest, plan.decided) for digest in plan.targets)
        if not restored and image is not None:
            self.resume_run(image, plan.decided)
        elif not restored and plan.targets:
            raise LaneFailedError("no snapshot in memory could be restored")
        elif not restored:
            self.begin_run()
            module.seeds.controller.carry_over(plan.decided, from_step=0, at_step=0)
            module.seeds.controller.apply(0)
        module.skipped.added.update(plan.left_out)
        module.skipped.ranges = plan.ranges

    def name_run(self, run_id: str) -> None:
        """Says to the job to which run it belongs."""
        self.module.callbacks.run.run_id = run_id

    def begin_run(self) -> None:
        """Gives the model of a new run the values of `training.init_from`, if it is set.

        Raises ConfigurationError if they cannot be read, or do not fit the model.
        """
        if not (init_from := self.settings.training.init_from):
            return
        try:
            note = warm_start(self.module.model, Path(init_from))
        except (ExportError, RollbackError) as error:
            raise ConfigurationError([f"training.init_from: {error}"]) from error
        self.notes = (*self.notes, note)

    def resume_run(self, image: StateImage, decided: Sequence[ActiveAdjustment] = ()) -> None:
        """Resumes as `resume` does. Raises ConfigurationError if the checkpoint does not fit these settings."""
        directory = self.settings.state.dir
        try:
            restored = self.resume(image, decided)
        except (RollbackError, SeedError, OptimizationError) as error:
            problem = (
                f"state.dir: {directory} holds an unfinished run that does not fit these settings: {error}; give this "
                "one another state.dir, or abandon that run with state.resume = never"
            )
            raise ConfigurationError([problem]) from error
        if restored.state_digest != restored.expected_digest:
            raise ConfigurationError([f"state.dir: {directory}: the resumed state is not the one that was saved"])

    def lane(self, heartbeat: LaneHeartbeat, traces_dir: Path, gate: PageGate | None = None) -> ThreadLane:
        """Returns the lane, which has not been started. `gate` is that of a lane in a separate process."""
        bytes_max = self.settings.profiler.traces_mb * _MIB
        return ThreadLane(
            self.module,
            self.snapshots,
            profiler=LaneProfiler(traces_dir, bytes_max=bytes_max, resting=heartbeat.lane_rests),
            heartbeat=heartbeat,
            threads=self.settings.training.threads or self._threads,
            gate=gate,
            stacks=Path(self.settings.state.dir) / STACKS_FILE,
        )


def build(
    settings: Settings, memory: SharedMemory | None = None, group: Group | None = None, run_id: str = ""
) -> BuiltLane:
    """Builds the job and everything that it provides, and takes a first look at it. Seeds all generators.

    With `memory` the captured states lie in shared memory. In a `group` each rank builds for itself, without the
    others; they have not joined their states yet.

    Raises:
        JobError: names the method that failed, or returned something invalid.
        ConfigurationError: the device does not exist, an extra is missing, or the schedule does not fit the run.
    """
    require_extras(settings)
    training = settings.training
    device = choose_device(training.device, 0 if group is None else group.local_rank)
    if training.deterministic:
        torch.use_deterministic_algorithms(mode=True)  # an operation without a deterministic kernel raises when used
        torch.backends.cudnn.benchmark = False
    seed_everything(training.seed)
    rank, world = (0, 1) if group is None else (group.rank, group.world)
    run = RunView(run_id, training.run_name, Path(settings.state.dir), rank, world)
    context = JobContext(training.seed, device, training.options, run=run)
    job = build_job(training.job, context)
    job_name = f"training.job {training.job!r}"
    try:
        sharding = _sharding(settings, group, device)
        module = _build_module(settings, job, context, sharding)
        if group is not None:
            module.share = _share(group, module)
            module.training_share = _divided(module)
        if sharding is not None:  # each pass and each copy is one of all ranks
            module.group = group
        snapshots = SnapshotManager(module, settings.rollback, memory)
        notes = first_look(module, snapshots.state)
        _check_best(settings, evaluates=module.evaluates)
        module.fast_paths.compile(
            module.model, lambda: first_look(module, snapshots.state), sharded=sharding is not None
        )
        module.group = group
        if group is not None:
            module.seeds.topology.agree = group.first_text
        return BuiltLane(settings, module, snapshots, (*notes, *_notes(module)))
    except ScheduleError as error:
        raise ConfigurationError([f"optimizer: {error}"]) from None
    except StateUnsupportedError as error:
        raise BrokenJobError(f"{job_name}: its model cannot be rolled back: {error}") from None
    except (BrokenJobError, EmptyDatasetError, LossShapeError) as error:
        raise type(error)(f"{job_name}: {error}") from error.__cause__
    except (OptimizationError, SeedError) as error:
        raise BrokenJobError(f"{job_name}: {error}") from None


def _sharding(settings: Settings, group: Group | None, device: torch.device) -> Sharding | None:
    if group is None or settings.lane.parallel != "fsdp":
        return None
    from tolaria.lane.sharding import Sharding  # noqa: PLC0415 - what it imports takes half a second

    return Sharding(group, device)


def _build_module(settings: Settings, job: TrainingJob, context: JobContext, sharding: Sharding | None) -> TrainModule:
    training, device = settings.training, context.device
    model = call("build_model", job.build_model, nn.Module)
    if name := next((n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta), ""):
        raise BrokenJobError(f"build_model(): {name!r} of its model is a meta tensor, which has no values")
    if sharding is None or lazy_names(model):
        model = model.to(device)  # sharding moves one part after the other
    cursor = call("training_data", job.training_data, BatchCursor)
    materialise(job, model, cursor, device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BrokenJobError("its model has no parameter that can be trained")
    if sharding is not None:
        sharding.shard_model(job, model)
    optimizer = _optimizer(job, model)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise BrokenJobError(
            f"{type(optimizer).__name__} evaluates the loss several times in a step, by a closure, but "
            "gradients are merged only once a step"
        )
    cursor = _in_intervals(settings, cursor)
    fast_paths = FastPaths(settings.fastpaths, device, deterministic=training.deterministic)
    if sharding is not None and fast_paths.scaler is not None:
        problem = "fastpaths.amp chooses float16, whose loss scale lane.parallel = fsdp does not support: use bfloat16"
        raise ConfigurationError([problem])
    fast_paths.fuse(optimizer)
    epoch_steps = -(-(cursor.batches_per_epoch or 1) // training.accumulate)
    run_steps = training.steps or training.epochs * epoch_steps
    shard_seed = None if sharding is None else sharding.shard_seed
    context.run.steps_per_epoch, context.run.total_steps = epoch_steps, run_steps
    schedule = schedule_of(job, optimizer)
    seeds = SeedTraining(model, optimizer, settings, run_steps, shard_seed)
    follow_schedule(seeds.controller, schedule)
    module = TrainModule(
        job, model, cursor, device, seeds=seeds, fast_paths=fast_paths, settings=settings, announced=context.announced
    )
    module.logged = context.logged
    context.run.model, context.run.rates = model, seeds.controller.learning_rates
    context.run.position = lambda: (module.global_step, module.progress.number)
    module.callbacks = JobCallbacks(callbacks_of(job), context.run, seeds.groups_as_built)
    return module


def _optimizer(job: TrainingJob, model: nn.Module) -> torch.optim.Optimizer:
    """Returns the job's optimizer. Raises BrokenJobError for several, and for anything else."""
    made: Any = call("build_optimizer", lambda: job.build_optimizer(model))
    if isinstance(made, (list, tuple, dict)):
        raise BrokenJobError(
            f"build_optimizer() must return one optimizer, got a {type(made).__name__} of {len(made)}: give it a param "
            'group for each network, and losses() a loss for each, as docs/training.md describes ("Several networks"); '
            "a scheduler is returned by lr_scheduler()"
        )
    optimizer: torch.optim.Optimizer = call("build_optimizer", lambda: made, torch.optim.Optimizer)
    return optimizer


def _in_intervals(settings: Settings, cursor: BatchCursor) -> BatchCursor:
    """Returns the cursor in epochs of a fixed number of steps, if the settings or the data's length ask for that.

    Raises:
        EmptyDatasetError: there is no batch.
        BrokenJobError: nothing says how long an epoch is, or a run.
    """
    training, batches = settings.training, call("training_data", lambda: cursor.batches_per_epoch)
    if batches is not None and batches < 1:
        raise EmptyDatasetError("its training data holds no batch")
    if batches is None and not training.steps:
        raise BrokenJobError(
            "its training data have no length: set training.steps, after which the run ends, or give LoaderCursor the "
            "number of batches_per_epoch"
        )
    every = training.evaluate_every_steps or (INTERVAL_STEPS if batches is None else 0)
    return IntervalCursor(cursor, every * training.accumulate) if every else cursor


def _check_best(settings: Settings, *, evaluates: bool) -> None:
    """Raises ConfigurationError if the best checkpoint cannot be known, since nothing is evaluated."""
    best = settings.checkpoint.best
    asked = "best" in settings.checkpoint.model_fields_set and not settings.checkpoint.best_of_training
    if asked and not evaluates:
        problem = (
            f"checkpoint.best is {best}, but the job has no evaluation: name a metric of training, such as "
            "training/loss:min"
        )
        raise ConfigurationError([problem])


def _share(group: Group, module: TrainModule) -> Share:
    """Returns the rank's share of batches. Raises BrokenJobError if the data are divided already."""
    if module.loader is not None and module.loader.divides:
        raise BrokenJobError(
            "its DistributedSampler divides the data, of whose batches each rank takes its share: leave it out"
        )
    return Share(group.rank, group.world, module.job)


def _divided(module: TrainModule) -> Share:
    """Returns the share of training batches, of which each rank reads only its samples where the cursor can do so."""
    share, loader = module.share, module.loader
    if isinstance(module.job, SharingJob) or loader is None:
        return share
    return replace(share, divided=loader.read_part(share.bounds, share.rank))


def _notes(module: TrainModule) -> tuple[str, ...]:
    notes = () if module.loader is None else module.loader.notes
    return (*notes, *schedule_notes(module.job, module.optimizer, module.seeds.controller))
