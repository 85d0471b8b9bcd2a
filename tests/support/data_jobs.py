"""Jobs whose data are streams or several validation sets, or that are not evaluated at all."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from tolaria.jobs import HOST, Batch, BatchCursor, Evaluation, JobContext, LoaderCursor, TensorCursor

FEATURES = 4


def sample(index: int) -> tuple[Tensor, Tensor]:
    """Returns the sample of that number."""
    x = torch.randn(FEATURES, generator=torch.Generator().manual_seed(index))
    return x, x.sum(0, keepdim=True)


class Numbers(IterableDataset[Any]):
    """Samples 0, 1, 2 ... up to `samples`, or without end; with noise from the global generator if asked for."""

    def __init__(self, samples: int | None, *, noise: bool = False, left_out: Collection[int] = ()) -> None:
        self.samples, self.noise, self.left_out = samples, noise, left_out
        self.at = self.read = 0

    def __iter__(self) -> Iterator[Any]:
        while self.samples is None or self.at < self.samples:
            index = self.at
            self.at += 1
            if index in self.left_out:
                continue
            self.read += 1
            x, y = sample(index)
            yield x + 0.1 * torch.rand(FEATURES) if self.noise else x, y
        self.at = 0


class Remembered(Numbers):
    """The same with state."""

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Forgetful(Numbers):
    """The same from the beginning for each iterator, without state."""

    def __iter__(self) -> Iterator[Any]:
        self.at = 0
        return super().__iter__()


class StreamJob:
    """Regression with dropout on a stream.

    Options: stream (loader: torchdata's loader, which keeps the state; dataset: a plain loader over a data set with
    state; none: without state; table: tensors in memory), samples (absent: no end), left_out (samples), noise,
    batch, step_s, sets (names of validation sets; absent: one without a name; []: none), log (a file in which the
    targets of each batch are noted).
    """

    def __init__(self, context: JobContext) -> None:
        self.context, self.options, self.seed = context, dict(context.options), context.seed
        samples: Any = self.options.get("samples")
        left_out: Any = self.options.get("left_out", [])
        kind = Forgetful if self.options.get("stream", "loader") == "none" else Remembered
        self.dataset = kind(samples, noise=bool(self.options.get("noise")), left_out=left_out)
        self.batch = int(str(self.options.get("batch", 4)))
        self.inputs = torch.stack([sample(10**6 + index)[0] for index in range(22)])

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=1e-2)

    def training_data(self) -> BatchCursor:
        kind = self.options.get("stream", "loader")
        if kind == "table":
            return TensorCursor((self.inputs, self.inputs.sum(1, keepdim=True)), batch_size=self.batch, seed=self.seed)
        if kind == "loader":
            return LoaderCursor(StatefulDataLoader(self.dataset, batch_size=self.batch), seed=self.seed)
        return LoaderCursor(DataLoader(self.dataset, batch_size=self.batch), seed=self.seed)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        x, y = batch.payload
        time.sleep(float(str(self.options.get("step_s", 0.0))))
        if log := self.options.get("log"):
            with Path(str(log)).open("a") as file:
                file.write(json.dumps(y[:, 0].tolist()) + "\n")
        self.context.log("mean", y.mean())
        return {HOST: functional.mse_loss(model(x), y)}

    def validation_batches(self) -> Any:
        names: Any = self.options.get("sets")
        if names is None:
            return [Batch((self.inputs, self.inputs.sum(1, keepdim=True)), len(self.inputs))]
        return {name: self._set(float(place)) for place, name in enumerate(names)} or None

    def _set(self, shift: float) -> DataLoader[Any]:
        x = self.inputs + shift
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        x, y = batch.payload
        error = (model(x) - y).abs()
        close = int((error < 0.5).sum())
        return Evaluation(float((error * error).sum()), close, batch.samples, {"mae": error.mean()})


class Unevaluated:
    """The same job without the two methods of an evaluation."""

    def __init__(self, context: JobContext) -> None:
        self._job = StreamJob(context)
        self.build_model, self.build_optimizer = self._job.build_model, self._job.build_optimizer
        self.training_data, self.losses = self._job.training_data, self._job.losses
