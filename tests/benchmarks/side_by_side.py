"""Shared by the benchmarks of snapshots, rollbacks and checkpoints: a job with a large state, and measurements."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from tolaria.jobs import HOST, Batch, Evaluation, JobContext, TensorCursor

WIDTH = 1000


class WideJob:
    """Layers of a million parameters on noise, under Adam: 12 MB of state a layer. Options: layers, batch, steps."""

    def __init__(self, context: JobContext) -> None:
        options = {name: int(str(value)) for name, value in context.options.items()}
        self.layers, self.batch = options["layers"], options["batch"]
        generator = torch.Generator().manual_seed(context.seed)
        self.x = torch.randn(self.batch * options["steps"], WIDTH, generator=generator)
        self.seed = context.seed

    def build_model(self) -> nn.Module:
        """The layers, with a ReLU behind each but the last."""
        hidden = [m for _ in range(self.layers - 1) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(WIDTH, WIDTH))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Adam, fused as `fastpaths.fused` would choose it."""
        return torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def training_data(self) -> TensorCursor:
        """The noise, in `steps` batches."""
        return TensorCursor((self.x,), batch_size=self.batch, seed=self.seed)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """How far the output is from the input."""
        (x,) = batch.payload
        return {HOST: functional.mse_loss(model(x), x)}

    def validation_batches(self) -> Iterable[Batch]:
        """One row."""
        return [Batch((self.x[:1],), 1)]

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """The loss; nothing is right or wrong."""
        (x,) = batch.payload
        return Evaluation(float(functional.mse_loss(model(x), x)), 0, batch.samples)


def in_turn(repeats: int, actions: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Returns seconds of each action, run in turn under the same conditions, without the first round."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats + 1):
        for name, action in actions.items():
            seconds = timed(action)
            if turn:
                taken[name].append(seconds)
    return taken


def timed(action: Callable[[], object]) -> float:
    """Returns the seconds that the call takes."""
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s


def p99(seconds: Sequence[float]) -> float:
    """Returns the 99th percentile; of fewer than a hundred samples the largest."""
    return statistics.quantiles(seconds, n=100)[98] if len(seconds) >= 100 else max(seconds)


def show(title: str, base: str, found: Mapping[str, Sequence[float]], words: Mapping[str, str]) -> None:
    """Prints one table: median, p99, and the median of each round's ratio to `base`, whose noise is mostly shared."""
    print(f"\n{title}")
    print(f"| {'what':<66} | median ms | p99 ms | ratio |")
    print("| --- | --- | --- | --- |")
    for name, text in words.items():
        ratio = statistics.median(a / b for a, b in zip(found[name], found[base], strict=True))
        median_ms, p99_ms = 1e3 * statistics.median(found[name]), 1e3 * p99(found[name])
        print(f"| {text:<66} | {median_ms:8.2f} | {p99_ms:8.2f} | {ratio:5.2f} |")


def machine() -> str:
    """Returns cores, torch version and load, for a title."""
    load = Path("/proc/loadavg").read_text(encoding="ascii").split()[0]
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, torch {torch.__version__}, {torch.get_num_threads()} thread(s), load {load}"
