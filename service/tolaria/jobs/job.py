"""The interface of a training job: model, optimizer, resumable data, losses and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from tolaria.values.training import Evaluation

CursorState = dict[str, JsonValue]


@dataclass(frozen=True, slots=True)
class JobContext:
    """The argument of a job's factory: `training.seed`, the training device, and `training.options`."""

    seed: int
    device: torch.device
    options: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch.

    Attributes:
        payload: the job's data: tensors, or tuples, lists and dicts of them.
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
    def batches_per_epoch(self) -> int:
        """The number of batches in an epoch."""

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

    def validation_batches(self) -> Iterable[Batch]:
        """Returns the batches for the evaluation after each epoch."""

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """Evaluates one batch. The model is in evaluation mode and gradients are disabled."""


JobFactory = Callable[[JobContext], TrainingJob]
