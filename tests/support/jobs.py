"""Tiny training jobs: some that work, and some that are each broken in one way."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import random
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tolaria.jobs import HOST, Batch, Evaluation, JobContext, PerSampleLosses, TensorCursor
from tolaria.seeds import SeedSlot

SAMPLES, FEATURES, BATCH = 64, 4, 8


class TinyJob:
    """Linear regression on 64 random samples. `options`: samples, poison_from, poison_steps, dropout."""

    def __init__(self, context: JobContext) -> None:
        self.context = context
        samples = int(str(context.options.get("samples", SAMPLES)))
        self.poison_from = int(str(context.options.get("poison_from", -1)))
        self.poison_steps = int(str(context.options.get("poison_steps", 1)))
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(samples, FEATURES, generator=generator)
        self.y = self.x.sum(1, keepdim=True)
        self.seen = 0
        self.dropout = float(str(context.options.get("dropout", 0.0)))

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(self.dropout), nn.ReLU(), nn.Linear(8, 1)
        )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def training_data(self) -> TensorCursor:
        return TensorCursor((self.x, self.y), batch_size=BATCH, seed=self.context.seed)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        x, y = batch.payload
        loss = functional.mse_loss(model(x), y)
        self.seen += 1
        if self.poison_from >= 0 and self.poison_from < self.seen <= self.poison_from + self.poison_steps:
            loss = loss * float("nan")
        return {HOST: loss}

    def validation_batches(self) -> Iterable[Batch]:
        return [Batch((self.x, self.y), len(self.x))]

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        x, y = batch.payload
        loss = functional.mse_loss(model(x), y, reduction="sum")
        return Evaluation(float(loss), int(((model(x) - y).abs() < 0.5).sum()), batch.samples)


class GatedJob(TinyJob):
    """Blocks in every forward pass after the first, a trial at startup, until the test releases `passes`."""

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self.passes = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        if self.seen:
            self.entered.release()
            if not self.passes.acquire(timeout=180):
                raise TimeoutError("no pass was released")
        return super().losses(model, batch)


class VectorLossJob(TinyJob):
    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        x, y = batch.payload
        return {HOST: functional.mse_loss(model(x), y, reduction="none")}


class LateCrashJob(TinyJob):
    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        if self.seen == 3:
            raise RuntimeError("the disk with the labels is gone")
        return super().losses(model, batch)


class NoHostLossJob(TinyJob):
    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"other": super().losses(model, batch)[HOST]}


class DetachedLossJob(TinyJob):
    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {HOST: super().losses(model, batch)[HOST].detach()}


def raising_factory(context: JobContext) -> TinyJob:
    """Raises an exception instead of building a job."""
    raise ZeroDivisionError("no shards")


def raises_what_it_finds(context: JobContext) -> TinyJob:
    """Runs an event loop, as the code of jobs does that read data over the network; raises the collector's state."""
    asyncio.run(asyncio.sleep(0))
    raise RuntimeError(f"collects: {gc.isenabled()}, leaves most out: {gc.get_freeze_count() > len(gc.get_objects())}")


def not_a_job(context: JobContext) -> object:
    """Returns an object that is not a job."""
    return object()


not_callable = 3


class StuckJob(TinyJob):
    """Never returns from its second forward pass."""

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        if self.seen:
            threading.Event().wait()
        return super().losses(model, batch)


class SlowJob(TinyJob):
    """Sleeps for `options["seconds"]` in every forward pass but the first."""

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        if self.seen:
            time.sleep(float(str(self.context.options["seconds"])))
        return super().losses(model, batch)


class GilJob(TinyJob):
    """Holds the GIL in C for `options["seconds"]` in its fiftieth forward pass, as a bad extension does."""

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        if self.seen == 50:
            ctypes.PyDLL(None).sleep(int(str(self.context.options["seconds"])))
        return super().losses(model, batch)


class HalfStateJob(TinyJob):
    """Has state, but cannot load it."""

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}


class MeanJob(TinyJob):
    """Its state is the sum and the number of the losses that it has returned."""

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self.total, self.count = torch.zeros(()), 0

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        losses = super().losses(model, batch)
        self.total += losses[HOST].detach()
        self.count += 1
        return losses

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.total, self.count = torch.as_tensor(state["total"]), int(state["count"])


class SlotJob(TinyJob):
    """TinyJob with a slot for a seed."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.Tanh(), SeedSlot("middle", features=8, layout="vector"), nn.Linear(8, 1)
        )


class RandomisedJob(SlotJob):
    """SlotJob with dropout, noise from numpy's and Python's RNGs, and the optimizer `options["optimizer"]`."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.2),
            nn.Tanh(),
            SeedSlot("middle", features=8, layout="vector"),
            nn.Linear(8, 1),
        )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        kind = str(self.context.options["optimizer"])
        if kind == "SGD":
            return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        adams = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
        optimizer: torch.optim.Optimizer = adams[kind](model.parameters(), lr=0.01, amsgrad=True)
        return optimizer

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        x, y = batch.payload
        noisy = x + 0.01 * float(np.random.standard_normal()) + 0.01 * random.random()  # noqa: NPY002 - the global ones
        return {HOST: functional.mse_loss(model(noisy), y)}


class CorruptedDataJob(TinyJob):
    """TinyJob that multiplies the targets of some batches by `options["factor"]`.

    `options["corrupted"]` lists the batches as pairs of epoch and index.
    """

    def training_data(self) -> TensorCursor:
        corrupted = cast("list[list[int]]", self.context.options["corrupted"])
        cursor = _CorruptingCursor((self.x, self.y), batch_size=BATCH, seed=self.context.seed)
        cursor.corrupted = {(epoch, index) for epoch, index in corrupted}
        cursor.factor = float(str(self.context.options.get("factor", 1e4)))
        return cursor


class _CorruptingCursor(TensorCursor):
    corrupted: set[tuple[int, int]]
    factor: float

    def next_batch(self) -> Batch | None:
        state = self.state_dict()
        batch = super().next_batch()
        if batch is None or (state["epoch"], state["index"]) not in self.corrupted:
            return batch
        x, y = batch.payload
        return replace(batch, payload=(x, y * self.factor))


class ConflictingTasksJob(TinyJob):
    """Two tasks with conflicting gradients over two weights, along and across a steep, curved valley of the loss.

    `options["rate"]` is the learning rate.
    """

    def build_model(self) -> nn.Module:
        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[-4.0, 2.0]]))
        return model

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=float(str(self.context.options["rate"])))

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        along, across = self.tasks(model)
        return {HOST: 0.0 * along, "along": along, "across": across}

    @staticmethod
    def tasks(model: nn.Module) -> tuple[Tensor, Tensor]:
        """Returns the losses of both tasks; where the valley is steep, the second dominates a plain sum."""
        along, across = next(model.parameters()).flatten()
        floor = 0.5 * torch.sin(along) + 0.2 * along
        return (along - 3).square(), 200 * (across - floor).square() + 0.1 * (along - 2.5).square()

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        return Evaluation(sum(task.item() for task in self.tasks(model)), 0, 1)


class SeedIdsJob(SlotJob):
    """Data with seed ids: every other sample belongs to seed `a`; losses are per sample."""

    def training_data(self) -> TensorCursor:
        return _WithSeedIds((self.x, self.y), batch_size=BATCH, seed=self.context.seed)

    def losses(self, model: nn.Module, batch: Batch) -> PerSampleLosses:  # type: ignore[override]
        x, y = batch.payload
        return PerSampleLosses((model(x) - y).square().flatten())


class _WithSeedIds(TensorCursor):
    @staticmethod
    def owner(index: int) -> str:
        """The seed that the sample at this index of a batch belongs to; empty for the host."""
        return "a" if index % 2 else ""

    def next_batch(self) -> Batch | None:
        batch = super().next_batch()
        return batch and replace(batch, seed_ids=[self.owner(index) for index in range(batch.samples)])


class WithoutValidationJob(SlotJob):
    """SlotJob without validation batches, except in the trial at startup, so that a held run is at a step boundary.

    An update is one microbatch, so a run could otherwise be held between step boundaries only during validation.
    """

    tried = False

    def validation_batches(self) -> Iterable[Batch]:
        first, self.tried = not self.tried, True
        return super().validation_batches() if first else []


class CollapsingJob(GatedJob):
    """Has accuracy 0.9, but 0.1 in the first `options["times"]` validations of the epochs `options["collapses"]`.

    In the epochs `options["gated"]` it blocks like GatedJob, from the sixth pass on and in validations that collapse.
    """

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        collapses = cast("list[int]", context.options["collapses"])
        self.remaining = dict.fromkeys(collapses, int(str(context.options["times"])))
        self.gated = cast("list[int]", context.options["gated"])
        self.collapsed = 0
        self.validating = threading.Event()
        self.cursor = super().training_data()

    def training_data(self) -> TensorCursor:
        return self.cursor

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        position = self.cursor.state_dict()
        if self.seen and (position["epoch"] not in self.gated or int(str(position["index"])) < 6):
            self.passes.release()
        return super().losses(model, batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        epoch = int(str(self.cursor.state_dict()["epoch"]))
        collapses = self.remaining.get(epoch, 0) > 0
        if collapses:
            if epoch in self.gated:
                self.validating.set()
                assert self.passes.acquire(timeout=180)
            self.remaining[epoch] -= 1
            self.collapsed += 1
        return Evaluation(1.0 * batch.samples, round((0.1 if collapses else 0.9) * batch.samples), batch.samples)
