"""The built-in job: scikit-learn's handwritten digits (1797 images of 8 x 8) and a small host.

By default the host is a convolutional network. The demo uses a linear classifier of thumbnails, which cannot do without
the seeds that are grafted into it, gives part of the images to seeds, and makes a few batches unreadable on the way.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from tolaria.errors import BrokenJobError
from tolaria.jobs.data import TensorCursor
from tolaria.jobs.job import Batch, JobContext, PerSampleLosses
from tolaria.seeds import SeedSlot
from tolaria.values.evaluation import Evaluation
from tolaria.values.training import HOST

_CLASSES = 10
_VALIDATION_SAMPLES = 360  # a fifth
_SPLIT_SEED = 20_251_003  # fixed: runs with different seeds are evaluated on the same images
_THUMBNAIL = 16  # pixels
_POISON = {"huge": 1e4, "nan": float("nan")}


class DigitsOptions(BaseModel):
    """The `training.options` of this job.

    Attributes:
        batch_size: images in a batch.
        learning_rate: of Adam.
        host: `convolution`, or `thumbnail`: a linear classifier of 4 x 4 thumbnails with one seed slot before it.
        width: channels of the convolutional host.
        dropout: of the convolutional host.
        seed_sources: the training images belong in turn to the seeds `seed-1` to `seed-N`, each of which has a gradient
            of these images; those of seeds that are not in the model are the host's. An image changes its owner with
            every epoch, so that each seed sees all of them. 0: all are the host's.
        poison_epoch: the epoch in which some batches are corrupt. 0: none.
        poison_batch: the place of the first corrupt batch in that epoch, from 0.
        poison_batches: number of corrupt batches.
        poison: `huge`: the pixels are multiplied by 10,000. `nan`: they are not numbers.
    """

    model_config = ConfigDict(extra="forbid")

    batch_size: int = Field(default=32, ge=1, le=1437)
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    width: int = Field(default=16, ge=1, le=512)
    dropout: float = Field(default=0.25, ge=0, lt=1)
    host: Literal["convolution", "thumbnail"] = "convolution"
    seed_sources: int = Field(default=0, ge=0, le=16)
    poison_epoch: int = Field(default=0, ge=0)
    poison_batch: int = Field(default=20, ge=0)
    poison_batches: int = Field(default=2, ge=1)
    poison: Literal["huge", "nan"] = "huge"


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


class ThumbnailHost(nn.Module):
    """A linear classifier of thumbnails of 16 pixels, with a seed slot before it.

    Maps images of shape (B, 1, 8, 8), float32 in 0 to 1, to logits of shape (B, 10). A seed in the slot makes it a
    network with a hidden layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.thumbnail = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
        self.slot = SeedSlot("pixels", features=_THUMBNAIL, layout="vector")
        self.head = nn.Linear(_THUMBNAIL, _CLASSES)

    def forward(self, x_B1HW: Tensor) -> Tensor:  # noqa: N803 - the shape suffix: batch, channel, height, width
        """Returns the logits."""
        logits_BC: Tensor = self.head(self.slot(self.thumbnail(x_B1HW)))  # noqa: N806 - shape suffix: batch, class
        return logits_BC


class DigitsCursor(TensorCursor):
    """Batches of images and labels, with the seed of each image and with the corrupt batches of the options."""

    def __init__(self, images: Tensor, labels: Tensor, options: DigitsOptions, seed: int) -> None:
        super().__init__((images, labels, torch.arange(len(images))), batch_size=options.batch_size, seed=seed)
        self._options = options
        self._names = [f"seed-{number}" for number in range(1, options.seed_sources + 1)]

    def next_batch(self) -> Batch | None:
        """Returns images, labels and the seed of each image."""
        place = self.state_dict()
        batch = super().next_batch()
        if batch is None:
            return None
        images, labels, places = batch.payload
        poisoned = range(self._options.poison_batch, self._options.poison_batch + self._options.poison_batches)
        if place["epoch"] == self._options.poison_epoch and place["index"] in poisoned:
            images = images * _POISON[self._options.poison]
        seed_ids = None
        if self._names:
            epoch = cast("int", place["epoch"])
            seed_ids = [self._names[(image + epoch) % len(self._names)] for image in places.tolist()]
        return replace(batch, payload=(images, labels), seed_ids=seed_ids)


class DigitsJob:
    """Trains a host with Adam on cross-entropy."""

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
        if self._options.host == "thumbnail":
            return ThumbnailHost()
        return DigitsHost(self._options.width, self._options.dropout)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns Adam over all parameters."""
        return torch.optim.Adam(model.parameters(), lr=self._options.learning_rate)

    def training_data(self) -> DigitsCursor:
        """Returns the 1437 training images; their order is a function of the seed and the epoch."""
        return DigitsCursor(*self._training, self._options, self._context.seed)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor] | PerSampleLosses:
        """Returns the mean cross-entropy, or that of each image if the images have seeds."""
        images, labels = batch.payload
        if batch.seed_ids is not None:
            return PerSampleLosses(functional.cross_entropy(model(images), labels, reduction="none"))
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
    spec = importlib.util.find_spec("sklearn")
    root = Path(spec.origin).parent if spec and spec.origin else Path()
    file = root / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():  # what `load_digits` reads; importing that takes a second
        with gzip.open(file, "rt", encoding="ascii") as lines:
            rows = torch.tensor([[float(value) for value in line.split(",")] for line in lines])
        return rows[:, :-1].reshape(-1, 1, 8, 8) / 16.0, rows[:, -1].long()
    from sklearn.datasets import load_digits  # noqa: PLC0415

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0, torch.tensor(data.target)
