"""The built-in job: scikit-learn's handwritten digits (1797 images of 8 x 8) and a small convolutional model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from tolaria.errors import BrokenJobError
from tolaria.jobs.data import TensorCursor
from tolaria.jobs.job import Batch, JobContext
from tolaria.seeds import SeedSlot
from tolaria.values.training import HOST, Evaluation

_CLASSES = 10
_VALIDATION_SAMPLES = 360  # a fifth
_SPLIT_SEED = 20_251_003  # fixed: runs with different seeds are evaluated on the same images


class DigitsOptions(BaseModel):
    """The `training.options` of this job."""

    model_config = ConfigDict(extra="forbid")

    batch_size: int = Field(default=32, ge=1, le=1437)
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    width: int = Field(default=16, ge=1, le=512)
    dropout: float = Field(default=0.25, ge=0, lt=1)


class DigitsHost(nn.Module):
    """Maps images of shape (B, 1, 8, 8), float32 in 0 to 1, to logits of shape (B, 10); has two seed slots."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            SeedSlot("early", features=width, layout="image"),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            SeedSlot("late", features=2 * width, layout="image"),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width * 16, _CLASSES))

    def forward(self, x_B1HW: Tensor) -> Tensor:  # noqa: N803 - the shape suffix: batch, channel, height, width
        """Returns the logits."""
        logits_BC: Tensor = self.head(self.body(x_B1HW))  # noqa: N806 - shape suffix: batch, class
        return logits_BC


class DigitsJob:
    """Trains `DigitsHost` with Adam on cross-entropy."""

    def __init__(self, context: JobContext, options: DigitsOptions) -> None:
        self._context = context
        self._options = options
        images, labels = _images()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
        validation, training = order[:_VALIDATION_SAMPLES], order[_VALIDATION_SAMPLES:]
        self._training = (images[training], labels[training])
        self._validation = (images[validation], labels[validation])

    def build_model(self) -> nn.Module:
        """Returns the model, with initial values from the global RNG."""
        return DigitsHost(self._options.width, self._options.dropout)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns Adam over all parameters."""
        return torch.optim.Adam(model.parameters(), lr=self._options.learning_rate)

    def training_data(self) -> TensorCursor:
        """Returns the 1437 training images; their order is a function of the seed and the epoch."""
        return TensorCursor(self._training, batch_size=self._options.batch_size, seed=self._context.seed)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Returns the mean cross-entropy."""
        images, labels = batch.payload
        return {HOST: functional.cross_entropy(model(images), labels)}

    def validation_batches(self) -> Iterable[Batch]:
        """Returns the 360 validation images in one batch."""
        return [Batch(self._validation, _VALIDATION_SAMPLES)]

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """Returns the sum of the cross-entropy and the number of correct predictions."""
        images, labels = batch.payload
        logits = model(images)
        loss_sum = functional.cross_entropy(logits, labels, reduction="sum")
        return Evaluation(float(loss_sum), int((logits.argmax(1) == labels).sum()), batch.samples)


def digits(context: JobContext) -> DigitsJob:
    """Returns the job.

    Raises:
        BrokenJobError: `training.options` has an unknown or invalid entry.
    """
    try:
        options = DigitsOptions.model_validate(dict(context.options))
    except ValidationError as error:
        problems = "; ".join(f"training.options.{e['loc'][0]}: {e['msg']}" for e in error.errors())
        raise BrokenJobError(f"training.job 'digits': {problems}") from None
    return DigitsJob(context, options)


def _images() -> tuple[Tensor, Tensor]:
    """Returns all images, float32 of shape (1797, 1, 8, 8) in 0 to 1, and labels, int64 of shape (1797,)."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - importing takes half a second

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    return images, torch.tensor(data.target, dtype=torch.int64)
