"""The assembled things that a step needs: job, model, optimizer, data, device. Built once, then the lane's alone.

Owns their making and the first look at the job, which finds its mistakes before anything is served.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import JsonValue
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
)
from tolaria.jobs import Batch, BatchCursor, CursorState, Evaluation, JobContext, TrainingJob, build_job
from tolaria.state.encoding import capture_rngs, restore_rngs
from tolaria.training.device import choose_device, prefer_determinism
from tolaria.training.fastpaths import FastPaths, choose_fast_paths, compile_model, fuse
from tolaria.training.growth import Growth, new_growth
from tolaria.training.losses import checked_losses
from tolaria.training.merge import GradientMerger
from tolaria.training.place import EpochPlace, LeftOut

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class _UpdateBegan:
    """The place before an update's first microbatch."""

    cursor: CursorState
    batches: int
    rngs: tuple[dict[str, Tensor], dict[str, JsonValue]]


@dataclass(slots=True)
class Rig:
    """What the lane works on. `global_step` counts updates done; `parameters` are those that gradients go to.

    `left_out` are batches that `next_batch` passes over.
    """

    job: TrainingJob
    model: nn.Module
    cursor: BatchCursor
    device: torch.device
    accumulate: int
    clip_norm: float
    growth: Growth
    merger: GradientMerger
    paths: FastPaths
    parameters: list[nn.Parameter] = field(default_factory=list)
    clip_groups: list[list[nn.Parameter]] = field(default_factory=list)
    global_step: int = 0
    epoch: EpochPlace = field(default_factory=EpochPlace)
    left_out: LeftOut = field(default_factory=LeftOut)
    _update_began: _UpdateBegan | None = None
    _with_gradients: list[nn.Parameter] = field(default_factory=list)
    _buffers: list[Tensor] = field(default_factory=list)
    _kept_buffers: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.grew()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The live one; another one after a rebuild."""
        return self.growth.manager.optimizer

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one epoch; the last may have fewer microbatches."""
        return -(-self.cursor.batches_per_epoch // self.accumulate)

    def grew(self) -> None:
        """Look at the model anew, after its seeds have changed."""
        self.parameters = self.growth.trained()
        self.clip_groups = self.growth.clip_groups()
        self.merger.follow(self.growth.ground(self.global_step))
        self._with_gradients = [p for p in self.model.parameters() if p.requires_grad]
        self._buffers = list(self.model.buffers())
        self._kept_buffers = [buffer.detach().clone() for buffer in self._buffers]

    def begin_epoch(self) -> None:
        """Go to the first batch of the next epoch; nothing to do in the midst of one, as after a rollback."""
        self.model.train()
        if self.epoch.over:
            self.epoch.begin(self.epoch.number + 1)
            self.cursor.begin_epoch(self.epoch.number)

    def next_batch(self) -> Batch | None:
        """The next batch that is not left out; None at the end of the epoch."""
        while (batch := self.cursor.next_batch()) is not None:
            place, self.epoch.batches = self.epoch.batches, self.epoch.batches + 1
            if not self.left_out.holds(self.epoch.number, place):
                return batch
        return None

    def note_place(self) -> None:
        """Note where an update begins, so that one of several microbatches can be given up in between."""
        if self.accumulate > 1:
            self._update_began = _UpdateBegan(self.cursor.state_dict(), self.epoch.batches, capture_rngs())

    def give_update_up(self) -> None:
        """Be as `note_place` found it: the same update can be begun again."""
        self.clear_gradients()
        self.put_buffers_back()
        if (began := self._update_began) is not None:
            self.cursor.load_state_dict(began.cursor)
            self.epoch.batches = began.batches
            restore_rngs(*began.rngs)

    def clear_gradients(self) -> None:
        """Drop all gradients, also those of parameters that no optimizer holds."""
        for parameter in self._with_gradients:
            parameter.grad = None

    def keep_buffers(self) -> None:
        """Note the buffers (running statistics), so that a step that turns out void leaves no trace in them."""
        if self._buffers:
            torch._foreach_copy_(self._kept_buffers, self._buffers)

    def put_buffers_back(self) -> None:
        """Make the buffers what `keep_buffers` noted."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept_buffers)


def build_rig(settings: Settings) -> Rig:
    """Seed the RNGs, build the job and everything it makes, and try one forward pass.

    Raises:
        JobError: naming the method that failed and what it did, for every mistake that a first look can find.
        ConfigurationError: for a device that is not there or a schedule that is impossible in this run.
    """
    training = settings.training
    device = choose_device(training.device)
    if training.deterministic:
        prefer_determinism()
    seed_everything(training.seed)
    job = build_job(training.job, JobContext(training.seed, device, training.options))
    model = _made(training.job, "build_model", job.build_model, nn.Module).to(device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BrokenJobError(f"training.job {training.job!r}: its model has no parameter that can be trained")
    optimizer = _made(training.job, "build_optimizer", lambda: job.build_optimizer(model), torch.optim.Optimizer)
    cursor = _made(training.job, "training_data", job.training_data, BatchCursor)
    _demand_plain_step(training.job, optimizer)
    paths = choose_fast_paths(settings.fastpaths, device, deterministic=training.deterministic)
    growth = _new_growth(settings, model, optimizer, cursor)
    fuse(paths, settings.fastpaths, growth.manager, deterministic=training.deterministic)
    rig = Rig(
        job=job,
        model=model,
        cursor=cursor,
        device=device,
        accumulate=training.accumulate,
        clip_norm=training.clip_norm,
        growth=growth,
        merger=GradientMerger(
            settings.gradients,
            isolation=settings.seeds.isolation,
            run_seed=training.seed,
            ground=growth.ground(0),
        ),
        paths=paths,
    )
    _try_forward(training.job, rig)
    compile_model(
        paths,
        settings.fastpaths,
        model,
        lambda: _try_forward(training.job, rig, backward=True),
        deterministic=training.deterministic,
    )
    return rig


def _demand_plain_step(job_name: str, optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise BrokenJobError(
            f"training.job {job_name!r}: {type(optimizer).__name__} evaluates the loss several times in a step, "
            "by a closure, which gradients merged once a step cannot serve"
        )


def _new_growth(settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer, cursor: BatchCursor) -> Growth:
    training = settings.training
    batches = _calling(training.job, "training_data", lambda: cursor.batches_per_epoch)
    updates = training.epochs * -(-batches // training.accumulate)
    try:
        return new_growth(
            model,
            optimizer,
            settings=settings.optimizer,
            seeds=settings.seeds,
            run_seed=training.seed,
            run_steps=updates,
        )
    except ScheduleError as error:
        raise ConfigurationError([f"optimizer: {error}"]) from None
    except (OptimizationError, SeedError) as error:
        raise BrokenJobError(f"training.job {training.job!r}: {error}") from None


def seed_everything(seed: int) -> None:
    """Seed the global RNGs of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - jobs that use numpy's global RNG shall repeat as well
    random.seed(seed)


def to_device(payload: Any, device: torch.device, *, pinned: bool = False) -> Any:
    """Tensors in tuples, lists and dicts on `device`; everything else as it is. Does not synchronise."""
    if isinstance(payload, Tensor):
        if payload.device == device:
            return payload
        if pinned and payload.device.type == "cpu":  # only a copy from pinned memory does not block
            payload = payload.pin_memory()
        return payload.to(device, non_blocking=True)
    if isinstance(payload, dict):
        return {key: to_device(value, device, pinned=pinned) for key, value in payload.items()}
    if isinstance(payload, (tuple, list)):
        moved = [to_device(value, device, pinned=pinned) for value in payload]
        return type(payload)(*moved) if hasattr(payload, "_fields") else type(payload)(moved)  # a namedtuple has fields
    return payload


def on_device(batch: Batch, device: torch.device, *, pinned: bool = False) -> Batch:
    """The batch with its payload on `device`; on the CPU the batch itself. `pinned`: by way of pinned memory."""
    return batch if device.type == "cpu" else replace(batch, payload=to_device(batch.payload, device, pinned=pinned))


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


def _try_forward(job_name: str, rig: Rig, *, backward: bool = False) -> None:
    """One forward (and backward) pass of the first batch. RNGs, buffers, gradients and the cursor are as before."""
    torch_rng, numpy_rng, python_rng = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    rig.keep_buffers()
    try:
        place = _calling(job_name, "training_data", rig.cursor.state_dict)
        batch = _calling(job_name, "training_data", lambda: _first_batch(rig.cursor))
        if batch is None or rig.cursor.batches_per_epoch < 1:
            raise EmptyDatasetError(f"training.job {job_name!r}: its training data holds no batch")
        rig.model.train()
        losses = _calling(job_name, "losses", lambda: _forward(rig, batch))
        if backward:
            torch.autograd.backward(list(losses.values()))
        _try_evaluation(job_name, rig)
        _calling(job_name, "training_data", lambda: rig.cursor.load_state_dict(place))
    finally:
        rig.model.train()
        rig.clear_gradients()
        rig.put_buffers_back()
        torch.set_rng_state(torch_rng)
        np.random.set_state(numpy_rng)  # noqa: NPY002
        random.setstate(python_rng)


def _try_evaluation(job_name: str, rig: Rig) -> None:
    batches = _calling(job_name, "validation_batches", rig.job.validation_batches)
    batch = _calling(job_name, "validation_batches", lambda: next(iter(batches), None))
    if batch is None:
        raise EmptyDatasetError(f"training.job {job_name!r}: its validation data holds no batch")
    rig.model.eval()
    with torch.no_grad():
        _made(job_name, "evaluate", lambda: rig.job.evaluate(rig.model, on_device(batch, rig.device)), Evaluation)


def _forward(rig: Rig, batch: Batch) -> Mapping[str, Tensor]:
    with rig.paths.autocast():
        return checked_losses(rig.job, rig.model, on_device(batch, rig.device), ())


def _first_batch(cursor: BatchCursor) -> Batch | None:
    cursor.begin_epoch(1)
    return cursor.next_batch()
