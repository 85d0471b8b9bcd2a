"""Jobs for groups of ranks, in float64, so that a run on several ranks can be compared with one on a single rank."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from tolaria.jobs import HOST, Batch, Evaluation, JobContext, LoaderCursor, PerSampleLosses, TensorCursor
from tolaria.seeds import SeedSlot


class ExactJob:
    """Regression with a slot for a seed.

    Options: samples, batch, norm (BatchNorm), rate, sum (a loss as people write a mean), bad (a place), step_s.
    """

    def __init__(self, context: JobContext) -> None:
        torch.set_default_dtype(torch.float64)
        self.context, self.options = context, context.options
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(int(str(self.options.get("samples", 50))), 4, generator=generator)
        self.y = torch.sin(self.x).sum(1, keepdim=True)
        if "bad" in self.options:
            self.y[int(str(self.options["bad"]))] = float("nan")

    def build_model(self) -> nn.Module:
        norm = nn.BatchNorm1d(8) if self.options.get("norm") else nn.Identity()
        slot = SeedSlot("middle", features=8, layout="vector")
        return nn.Sequential(nn.Linear(4, 8), norm, nn.Tanh(), slot, nn.Linear(8, 1))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=float(str(self.options.get("rate", 0.05))), momentum=0.9)

    def training_data(self) -> TensorCursor:
        return TensorCursor((self.x, self.y), batch_size=int(str(self.options.get("batch", 7))), seed=self.context.seed)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor] | PerSampleLosses:
        x, y = batch.payload
        time.sleep(float(str(self.options.get("step_s", 0.0))))
        if self.options.get("sum"):
            return {HOST: functional.mse_loss(model(x), y, reduction="sum") / batch.samples}
        return {HOST: functional.mse_loss(model(x), y)}

    def validation_batches(self) -> Iterable[Batch]:
        clean = self.y.isfinite().flatten()
        yield from (
            Batch((x, y), len(x))
            for x, y in zip(torch.split(self.x[clean], 9), torch.split(self.y[clean], 9), strict=True)
        )

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        x, y = batch.payload
        found = model(x)
        loss = functional.mse_loss(found, y, reduction="sum")
        return Evaluation(float(loss), int(((found - y).abs() < 0.5).sum()), batch.samples)


class TasksJob(ExactJob):
    """Two tasks beside the host's loss, whose gradients conflict at times."""

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        x, y = batch.payload
        found = model(x)
        return {
            HOST: functional.mse_loss(found, y),
            "small": 0.1 * found.square().mean(),
            "inverse": 0.3 * functional.mse_loss(found, -y),
        }


class SeedIdsJob(ExactJob):
    """Every third sample belongs to seed `a`; losses are per sample."""

    def training_data(self) -> TensorCursor:
        return _WithSeedIds((self.x, self.y), batch_size=7, seed=self.context.seed)

    def losses(self, model: nn.Module, batch: Batch) -> PerSampleLosses:
        x, y = batch.payload
        return PerSampleLosses((model(x) - y).square().flatten())


class _WithSeedIds(TensorCursor):
    def next_batch(self) -> Batch | None:
        batch = super().next_batch()
        return batch and replace(batch, seed_ids=["a" if index % 3 == 2 else "" for index in range(batch.samples)])


class DrawnOrderJob(ExactJob):
    """Its cursor draws the order of an epoch from the global generator."""

    def training_data(self) -> TensorCursor:
        return _Drawn((self.x, self.y), batch_size=7, seed=self.context.seed)


class _Drawn(TensorCursor):
    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        self._chunks = torch.split(torch.randperm(len(self._tensors[0])), 7)


class DividedTwiceJob(ExactJob):
    """A DataLoader with the DistributedSampler of a script for torchrun."""

    def training_data(self) -> LoaderCursor:  # type: ignore[override]
        data = TensorDataset(self.x, self.y)
        sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(data, 2, torch.distributed.get_rank())
        return LoaderCursor(DataLoader(data, batch_size=7, sampler=sampler), seed=0)


class LoaderJob(ExactJob):
    """A shuffled DataLoader with a worker process."""

    def training_data(self) -> LoaderCursor:  # type: ignore[override]
        loader = DataLoader(TensorDataset(self.x, self.y), batch_size=7, shuffle=True, num_workers=1)
        return LoaderCursor(loader, seed=0)


class StreamSetsJob(ExactJob):
    """A stream without end that keeps its place, and two validation sets: one of a loader, one of batches."""

    def training_data(self) -> LoaderCursor:  # type: ignore[override] # another cursor
        return LoaderCursor(DataLoader(_Cycle(self.x, self.y), batch_size=7), seed=self.context.seed)

    def validation_batches(self) -> Any:
        return {
            "read": DataLoader(TensorDataset(self.x, self.y), batch_size=9),
            "given": [Batch((-self.x, self.y), 50)],
        }


class _Cycle(IterableDataset[Any]):
    """Samples over and over."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.at = x, y, 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            place, self.at = self.at % len(self.x), self.at + 1
            yield self.x[place], self.y[place]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class FailingRankJob(ExactJob):
    """Options: `fails_on` (rank) and `fails_at` (call of losses): raises there only."""

    calls = 0

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor] | PerSampleLosses:
        self.calls += 1
        if self.calls == self.options["fails_at"] and torch.distributed.get_rank() == self.options["fails_on"]:
            raise OSError("the file server does not answer")
        return super().losses(model, batch)


class FailingEvaluationJob(ExactJob):
    """Options: `fails_on` (rank): raises there, in the evaluation's last batch."""

    place = 0

    def validation_batches(self) -> Iterable[Batch]:
        for self.place, batch in enumerate(super().validation_batches()):
            yield batch

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        if self.place == 5 and torch.distributed.get_rank() == self.options["fails_on"]:
            raise OSError("the file server does not answer")
        return super().evaluate(model, batch)


class SlowRankJob(ExactJob):
    """Rank 1 takes longer for its losses."""

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor] | PerSampleLosses:
        time.sleep(0.05 * torch.distributed.get_rank())
        return super().losses(model, batch)


class UnbuildableRankJob(ExactJob):
    """Options: `fails_on` (rank): has no model there."""

    def build_model(self) -> nn.Module:
        if torch.distributed.get_rank() == self.options["fails_on"]:
            raise FileNotFoundError("no such file on this rank")
        return super().build_model()


class OddRankJob(ExactJob):
    """Options: `odd`: what rank 1 does otherwise (names, parameters, validation, order, fewer), or all (buffers)."""

    @property
    def odd(self) -> str:
        """What this rank does otherwise."""
        return str(self.options["odd"]) if torch.distributed.get_rank() == 1 else ""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        return _WithAverage(model) if self.options["odd"] == "buffers" else model

    def training_data(self) -> TensorCursor:
        kinds = {"order": _OtherSize, "fewer": _FewerBatches}
        kind = kinds.get(self.odd, TensorCursor)
        return kind((self.x, self.y), batch_size=7, seed=self.context.seed)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor] | PerSampleLosses:
        losses = super().losses(model, batch)
        if self.odd == "names" and isinstance(losses, Mapping):
            return {**losses, "extra": 0.0 * losses[HOST]}
        return losses

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = _Noisy(model.parameters(), lr=0.05)
        optimizer.noise = 1e-6 if self.odd == "parameters" else 0.0
        return optimizer

    def validation_batches(self) -> Iterable[Batch]:
        batches = list(super().validation_batches())
        return batches[:-1] if self.odd == "validation" else batches


class _Noisy(torch.optim.SGD):
    noise = 0.0

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(self.noise)
        return found


class _OtherSize(TensorCursor):
    def next_batch(self) -> Batch | None:
        batch = super().next_batch()
        if batch is None or batch.samples < 3 or self.state_dict()["index"] != 4:
            return batch
        x, y = batch.payload
        return Batch((x[:-1], y[:-1]), batch.samples - 1)


class _FewerBatches(TensorCursor):
    def next_batch(self) -> Batch | None:
        return None if self.state_dict()["index"] == 5 else super().next_batch()


class _WithAverage(nn.Module):
    average: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        found: Tensor = self.model(x)
        return found


class UnevenJob(ExactJob):
    """Blocks in a module list, whose sizes no number of ranks divides, trained by AdamW."""

    def build_model(self) -> nn.Module:
        return _Blocks()

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01)


class WideJob(ExactJob):
    """A model of some size. Options: width."""

    def build_model(self) -> nn.Module:
        """Nearly all of its parameters are in one matrix."""
        width = int(str(self.options["width"]))
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 1)).double()

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Has two moments for each parameter."""
        return torch.optim.AdamW(model.parameters(), lr=1e-4)


class AverageJob(UnevenJob):
    """Keeps a moving average of the weights in its state, from the first step on."""

    average: dict[str, Tensor]

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor] | PerSampleLosses:
        if not hasattr(self, "average"):
            self.average = {}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                kept = self.average.setdefault(name, parameter.detach().clone())
                kept.mul_(0.9).add_(parameter.detach(), alpha=0.1)
        return super().losses(model, batch)

    def state_dict(self) -> dict[str, Any]:
        return {"average": dict(getattr(self, "average", {}))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = dict(state["average"])


class UnseededJob(UnevenJob):
    """Its model is another one in every process."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        generator = torch.Generator()
        generator.seed()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.1 + torch.distributed.get_rank(), generator=generator)
        return model


class ScalarJob(UnevenJob):
    """Its model has a parameter of shape ()."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.temperature = nn.Parameter(torch.ones(()))
        return model


class SelfShardedJob(UnevenJob):
    """Says itself how its model is sharded. Option `whole`: leaves a parameter whole."""

    def shard(self, model: Any, mesh: Any) -> None:
        fully_shard(model.blocks[0], mesh=mesh)
        fully_shard(model.out if self.options.get("whole") else model, mesh=mesh)


class StubbornRankJob(UnevenJob):
    """Options: `fails_on` (rank): refuses to load a state that has taken steps there."""

    steps = 0

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor] | PerSampleLosses:
        self.steps += 1
        return super().losses(model, batch)

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        going_back = 2 < state["steps"] < self.steps - 2
        if going_back and torch.distributed.get_rank() == self.options["fails_on"]:
            raise ValueError("not on this rank")
        self.steps = state["steps"]


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 7)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7)) for _ in range(2)])
        self.slot = SeedSlot("middle", features=7, layout="vector")
        self.out = nn.Linear(7, 1)
        self.frozen = nn.Linear(7, 1).requires_grad_(False)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        for block in self.blocks:
            h = h + block(h)
        h = self.slot(torch.tanh(h))
        found: Tensor = self.out(h) + self.frozen(h) * self.scale.mean()  # type: ignore[operator]
        return found
