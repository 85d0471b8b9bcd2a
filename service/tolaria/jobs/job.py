"""What a training job is to Tolaria: a model, an optimizer, data that can be resumed, losses, evaluation.

Owns the contract between Tolaria and whoever brings a job. Must not know how training is run.
"""

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
    """What a job's factory gets: `training.seed`, the device to train on, and `training.options` as they are."""

    seed: int
    device: torch.device
    options: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch. `payload` is the job's own (tensors, or tuples, lists, dicts of them); `samples` counts it.

    `seed_ids` names the seed that each sample is meant for, where the data says so; it goes with `PerSampleLosses`.
    """

    payload: Any
    samples: int
    seed_ids: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class PerSampleLosses:
    """Losses of shape (samples,), differentiable, for a batch with `seed_ids`: Tolaria splits them by seed."""

    values: Tensor


@runtime_checkable
class BatchCursor(Protocol):
    """Training data with a place in it that can be saved and found again.

    The same cursor state gives the same batches: that is what makes a rollback exact.
    """

    @property
    def batches_per_epoch(self) -> int:
        """How many batches an epoch has."""

    def begin_epoch(self, epoch: int) -> None:
        """Go to the first batch of `epoch` (from 1)."""

    def next_batch(self) -> Batch | None:
        """The next batch, on the CPU or already on the device; None at the end of the epoch."""

    def state_dict(self) -> CursorState:
        """The place, as JSON values."""

    def load_state_dict(self, state: CursorState) -> None:
        """Go to a place that `state_dict` told, so that `next_batch` goes on from there."""


@runtime_checkable
class TrainingJob(Protocol):
    """What is trained. All methods are called from the compute lane, one at a time."""

    def build_model(self) -> nn.Module:
        """The model, on the CPU; Tolaria moves it to the device. Global RNGs are seeded before the call."""

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the model's parameters, which are on the device by then."""

    def training_data(self) -> BatchCursor:
        """The training data."""

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor] | PerSampleLosses:
        """Mean loss of the batch by source, each a scalar with a graph; `HOST` is always among them.

        Sources are seeds by their id, or tasks of the job's own. A batch with `seed_ids` may have its losses by sample.
        """

    def validation_batches(self) -> Iterable[Batch]:
        """What the model is evaluated on after each epoch."""

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """Evaluate one batch; the model is in eval mode and gradients are off."""


JobFactory = Callable[[JobContext], TrainingJob]
