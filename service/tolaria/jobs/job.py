"""The interface of a training job: model, optimizer, resumable data, losses and evaluation; and how a job is found."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from tolaria.errors import BrokenJobError, JobError, UnknownJobError
from tolaria.jobs.callbacks import RunView
from tolaria.optimization.job_schedule import LRSchedule, RateFactor
from tolaria.values.evaluation import METRICS_MAX, Evaluation, metric_name_problem

CursorState = dict[str, JsonValue]

_ANNOUNCED_MAX: Final = 16


class StepLog:
    """The metrics that a job has logged during a step, at most `METRICS_MAX` different ones in a run."""

    def __init__(self) -> None:
        self._values: dict[str, list[float | Tensor]] = {}
        self._names: set[str] = set()

    def add(self, name: str, value: float | Tensor) -> None:
        """Notes a value, as `JobContext.log` does."""
        if name not in self._names:
            if problem := metric_name_problem(name):
                raise BrokenJobError(f"context.log(): {problem}")
            if len(self._names) >= METRICS_MAX:
                warnings.warn(f"context.log({name!r}): not shown, beyond {METRICS_MAX} metrics of a run", stacklevel=3)
                return
            self._names.add(name)
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise BrokenJobError(f"context.log({name!r}): a tensor of shape {tuple(value.shape)} is not a number")
            value = value.detach()
        elif not isinstance(value, int | float | np.number):
            raise BrokenJobError(f"context.log({name!r}): a {type(value).__name__} is not a number")
        self._values.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        """Returns the mean of each metric since the last call, and forgets them. Reading tensors synchronises."""
        if not self._values:
            return {}
        values, self._values = self._values, {}
        return {name: sum(map(float, found)) / len(found) for name, found in values.items()}

    def put_aside(self) -> dict[str, list[float | Tensor]]:
        """Returns the values since the last `take`, for `put_back`; what is logged in between is forgotten."""
        values, self._values = self._values, {}
        return values

    def put_back(self, values: dict[str, list[float | Tensor]]) -> None:
        """Takes back what `put_aside` has returned."""
        self._values = values

    def clear(self) -> None:
        """Forgets the values since the last `take`, but no name."""
        self._values.clear()


@dataclass(frozen=True, slots=True)
class JobContext:
    """The argument of a job's factory: `training.seed`, the training device, and `training.options`.

    A job that changes its task by design, as a curriculum does, keeps it and announces the change with `new_regime`.
    `announced` are the changes that training has not taken into account yet.
    """

    seed: int
    device: torch.device
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    announced: deque[str] = field(default_factory=lambda: deque(maxlen=_ANNOUNCED_MAX), compare=False, repr=False)
    logged: StepLog = field(default_factory=StepLog, compare=False, repr=False)
    run: RunView = field(default_factory=RunView, compare=False, repr=False)

    @property
    def run_id(self) -> str:
        """The id of the run, as all of these are described in `RunView`."""
        return self.run.run_id

    @property
    def run_name(self) -> str:
        """The name that people have given the run."""
        return self.run.run_name

    @property
    def state_dir(self) -> Path:
        """The directory `state.dir`."""
        return self.run.state_dir

    @property
    def rank(self) -> int:
        """The rank of this process in its group."""
        return self.run.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.run.world_size

    @property
    def step(self) -> int:
        """Completed optimizer updates."""
        return self.run.step

    @property
    def epoch(self) -> int:
        """The epoch, from 1; 0 before the first."""
        return self.run.epoch

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch; 0 until the data are known, which they are when the optimizer has been built."""
        return self.run.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; 0 until the data are known."""
        return self.run.total_steps

    def new_regime(self, reason: str) -> None:
        """Announces that the losses from this batch on are those of a changed task: higher ones are no explosion."""
        self.announced.append(reason)

    def log(self, name: str, value: float | Tensor) -> None:
        """Logs a metric of the step that is being taken, in `losses`; its mean over the step's microbatches is shown.

        A tensor without dimensions is read when the step is over, so that this does not synchronise. What a skipped
        step has logged is dropped. Of several ranks the first one's values are shown.

        Raises:
            BrokenJobError: the name cannot be that of a metric, or the value is not a number.
        """
        self.logged.add(name, value)


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch.

    Attributes:
        payload: the job's data: tensors, what moves to a device by its method `to`, or tuples, lists and dicts of them.
        samples: number of samples.
        seed_ids: the seed that each sample belongs to, if the data defines it; used with `PerSampleLosses`.
    """

    payload: Any
    samples: int
    seed_ids: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class PerSampleLosses:
    """Differentiable losses of a batch with `seed_ids`, of shape (samples,); Tolaria splits them by seed."""

    values: Tensor


@runtime_checkable
class BatchCursor(Protocol):
    """A resumable position in training data. Equal states give equal batches, so that a rollback is exact."""

    @property
    def batches_per_epoch(self) -> int | None:
        """The number of batches in an epoch; None if it is not known, or the data have no end."""

    def begin_epoch(self, epoch: int) -> None:
        """Moves to the first batch of `epoch`, counted from 1."""

    def next_batch(self) -> Batch | None:
        """Returns the next batch, on the CPU or the training device; None at the end of the epoch."""

    def state_dict(self) -> CursorState:
        """Returns the position as JSON values."""

    def load_state_dict(self, state: CursorState) -> None:
        """Moves to a saved position; `next_batch` continues from it."""


@runtime_checkable
class TrainingJob(Protocol):
    """A training job. The training process calls its methods one at a time."""

    def build_model(self) -> nn.Module:
        """Returns the model on the CPU; Tolaria moves it to the device. Global RNGs are seeded before the call."""

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns an optimizer over the model's parameters, which are on the device."""

    def training_data(self) -> BatchCursor:
        """Returns the training data."""

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor] | PerSampleLosses:
        """Returns the mean loss of the batch by source, each a differentiable scalar; `HOST` is always included.

        A source is the id of a seed, or a task of the job. For a batch with `seed_ids` the losses may be per sample.
        """


@runtime_checkable
class EvaluatingJob(TrainingJob, Protocol):
    """A job that is evaluated after each epoch, as almost all are: without both methods there is no evaluation."""

    def validation_batches(self) -> Iterable[Batch] | DataLoader[Any] | Mapping[str, Any] | None:
        """Returns the batches for the evaluation after each epoch, or a loader of them.

        Several validation sets are a mapping of their names to batches or loaders, the main one first. None: there is
        no evaluation.
        """

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """Evaluates one batch. The model is in evaluation mode and gradients are disabled."""


@runtime_checkable
class StatefulJob(Protocol):
    """A job that keeps state itself, such as running statistics of its losses: it becomes part of the training state.

    So a rollback and a resumed run restore it, and digests cover it. The values are None, bool, int, float, str,
    tensors, and lists, tuples and dicts of these; keys are strings. What `load_state_dict` gets belongs to the job.

    A skipped step and a microbatch that is left out do not change the state either: it is copied before every step,
    and with several microbatches before each of these, which costs time and memory in proportion to its size.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """Returns the state; tensors may be the live ones. Called between two passes, after `build_model`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""


@runtime_checkable
class TrainModeJob(Protocol):
    """A job that sets its model to training mode itself, for example to keep frozen layers in evaluation mode."""

    def train_mode(self, model: nn.Module) -> None:
        """Called in place of `model.train()`, before training and after each evaluation."""


@runtime_checkable
class ScheduledJob(Protocol):
    """A job that schedules its learning rates itself; `optimizer.policy` has to be `constant` then."""

    def lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LRSchedule | LRScheduler | RateFactor | None:
        """Returns a scheduler of `torch.optim.lr_scheduler`, or a function of the step; None for none.

        The function returns the factor of the rates of `build_optimizer`, as that of `LambdaLR` does. A scheduler is
        made with `optimizer`, which has the same parameters and options as that of `build_optimizer`, and is not
        stepped by the job. It becomes a part of the training state.
        """


@runtime_checkable
class CallbackJob(Protocol):
    """A job with callbacks."""

    def callbacks(self) -> Iterable[object]:
        """Returns them, in the order in which they are called: see `Callback`."""


JobFactory = Callable[[JobContext], TrainingJob]

ENTRY_POINTS = "tolaria.jobs"


def build_job(name: str, context: JobContext) -> TrainingJob:
    """Returns the job of a factory: an entry point of the group `tolaria.jobs`, or `package.module:factory`.

    Raises:
        UnknownJobError: there is no such name, module or factory.
        BrokenJobError: importing or calling the factory failed, or the job lacks a method of `TrainingJob`.
    """
    factory = load_factory(name)
    try:
        job = factory(context)
    except JobError:
        raise
    except (Exception, SystemExit) as error:
        raise BrokenJobError(f"training.job {name!r}: its factory raised {type(error).__name__}: {error}") from error
    methods = [method for method, _ in inspect.getmembers(TrainingJob, inspect.isfunction) if method[0] != "_"]
    missing = [method for method in methods if not callable(getattr(job, method, None))]
    if missing:
        raise BrokenJobError(
            f"training.job {name!r}: its factory returned a {type(job).__name__}, which lacks {', '.join(missing)}"
        )
    for one, other in (("state_dict", "load_state_dict"), ("validation_batches", "evaluate")):
        if hasattr(job, one) != hasattr(job, other):
            raise BrokenJobError(f"training.job {name!r}: {one} and {other} need each other; it has only one")
    return job


def load_factory(name: str) -> JobFactory:
    """Returns the factory of a job by `package.module:factory`, or by its name among the entry points.

    Raises UnknownJobError or BrokenJobError.
    """
    module, _, attribute = (name if ":" in name else _registered(name)).partition(":")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise UnknownJobError(f"training.job {name!r}: there is no module {error.name!r} on the path") from None
        raise BrokenJobError(f"training.job {name!r}: importing it failed: {error}") from error
    except (Exception, SystemExit) as error:
        raise BrokenJobError(f"training.job {name!r}: importing it raised {type(error).__name__}: {error}") from error
    if not hasattr(loaded, attribute):
        raise UnknownJobError(f"training.job {name!r}: module {module!r} has no {attribute!r}")
    factory: object = getattr(loaded, attribute)
    if not callable(factory):
        raise BrokenJobError(f"training.job {name!r}: is a {type(factory).__name__}, not a factory that can be called")
    return factory


def _registered(name: str) -> str:
    known = entry_points(group=ENTRY_POINTS)
    if name not in known.names:
        raise UnknownJobError(
            f"training.job {name!r} is not registered (known: {', '.join(sorted(known.names))}); "
            "name your own job as package.module:factory"
        )
    return known[name].value
