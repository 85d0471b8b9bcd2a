"""The cost of hosting: the same job under Tolaria, in a bare loop and in loops of other libraries, by turns.

    python tests/benchmarks/bench_hosting.py [--rounds N]

The others are a careful loop (the norm of the gradients, a check that it is finite, `loss.item()`), Fabric and
Accelerate, where `lightning` and `accelerate` are installed. All stamp their times in the job itself: an
epoch's steps run from `begin_epoch` to the first look at the validation data. The whole is everything from the first
epoch's begin to the last evaluation, boundaries included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tolaria import service
from tolaria.config import load_settings
from tolaria.jobs import HOST, Batch, Evaluation, JobContext, TensorCursor

STAMPS = "BENCH_STAMPS"
"""Environment variable with the file for the stamps of a job that runs in another process."""


@dataclass
class Stamps:
    """Times of one run, in seconds."""

    begins: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    steps: int = 0

    def step_ms(self) -> float:
        """Returns the median over epochs of the mean step, without the first epoch."""
        spans = [e - b for b, e in zip(self.begins[-len(self.ends) :], self.ends, strict=True)][1:]
        return 1000 * statistics.median(spans) / (self.steps / len(self.ends))

    def whole_ms(self) -> float:
        """Returns wall time from the first begin to the last end, per step."""
        return 1000 * (self.ends[-1] - self.begins[-len(self.ends)]) / self.steps


class StampedCursor(TensorCursor):
    """A cursor that notes when an epoch begins."""

    stamps: Stamps

    def begin_epoch(self, epoch: int) -> None:
        """Notes the time."""
        self.stamps.begins.append(time.perf_counter())
        super().begin_epoch(epoch)


class HostedJob:
    """An MLP on the digits; `width` and `depth` set how long a step takes."""

    stamps = Stamps()

    def __init__(self, context: JobContext) -> None:
        from sklearn.datasets import load_digits  # not while others are measured

        data = load_digits()
        self.options = {name: int(str(value)) for name, value in context.options.items()}
        self.x = torch.tensor(data.data, dtype=torch.float32) / 16.0
        self.y = torch.tensor(data.target)
        self.seed = context.seed
        self.validated = 0
        HostedJob.stamps = Stamps()

    def build_model(self) -> nn.Module:
        """`depth` hidden layers of `width`."""
        width = self.options["width"]
        sizes = [64, *[width] * self.options["depth"]]
        hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(width, 10))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns Adam with its defaults."""
        return torch.optim.Adam(model.parameters(), lr=1e-3)

    def training_data(self) -> TensorCursor:
        """Returns the images, repeated until an epoch has its steps."""
        copies = -(-self.options["steps"] * 32 // len(self.x))
        rows = torch.arange(self.options["steps"] * 32) % len(self.x) if copies else torch.arange(0)
        cursor = StampedCursor((self.x[rows], self.y[rows]), batch_size=32, seed=self.seed)
        cursor.stamps = HostedJob.stamps
        return cursor

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Cross-entropy."""
        x, y = batch.payload
        HostedJob.stamps.steps += 1
        return {HOST: functional.cross_entropy(model(x), y)}

    def validation_batches(self) -> Iterable[Batch]:
        """Notes the end of an epoch's steps; the first forward pass of the build does not count."""
        if HostedJob.stamps.steps > 1:
            HostedJob.stamps.ends.append(time.perf_counter())
            if path := os.environ.get(STAMPS):
                Path(path).write_text(json.dumps(asdict(HostedJob.stamps)), encoding="utf-8")
        else:
            HostedJob.stamps.steps = 0
        return [Batch((self.x[:64], self.y[:64]), 64)]

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """Cross-entropy and correct answers."""
        x, y = batch.payload
        logits = model(x)
        loss = float(functional.cross_entropy(logits, y, reduction="sum"))
        return Evaluation(loss, int((logits.argmax(1) == y).sum()), batch.samples)


Update = Callable[[nn.Module, torch.optim.Optimizer, Tensor], None]
"""Computes the gradients of a loss and takes the optimizer's step."""


def trained(
    options: dict[str, int],
    epochs: int,
    *,
    update: Update,
    prepare: Callable[..., Any] = lambda *given: given,
) -> Stamps:
    """Trains in a loop whose steps end with `update`; `prepare` wraps model and optimizer."""
    torch.manual_seed(0)
    job = HostedJob(JobContext(0, torch.device("cpu"), options))
    built = job.build_model()
    model, optimizer = prepare(built, job.build_optimizer(built))
    cursor = job.training_data()
    for epoch in range(1, epochs + 1):
        model.train()
        cursor.begin_epoch(epoch)
        while (batch := cursor.next_batch()) is not None:
            optimizer.zero_grad()
            update(model, optimizer, job.losses(model, batch)[HOST])
        model.eval()
        with torch.no_grad():
            for batch in job.validation_batches():
                job.evaluate(model, batch)
    return HostedJob.stamps


def bare_update(_model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Computes gradients and takes a step, without checks."""
    loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    optimizer.step()


def careful_update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Reads the loss and the norm of the gradients, and takes the step only if both are finite."""
    loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if math.isfinite(loss.item()) and math.isfinite(norm.item()):
        optimizer.step()


def with_fabric(options: dict[str, int], epochs: int) -> Stamps:
    """Trains with Lightning Fabric."""
    from lightning.fabric import Fabric  # also the lane imports this module, for the job

    fabric = Fabric(accelerator="cpu", devices=1)

    def update(_model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        fabric.backward(loss)
        optimizer.step()

    return trained(options, epochs, update=update, prepare=fabric.setup)


def with_accelerate(options: dict[str, int], epochs: int) -> Stamps:
    """Trains with Accelerate."""
    from accelerate import Accelerator  # type: ignore[import-not-found, unused-ignore] # not a dependency

    accelerator = Accelerator(cpu=True)

    def update(_model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        accelerator.backward(loss)
        optimizer.step()

    return trained(options, epochs, update=update, prepare=accelerator.prepare)


def hosted(options: dict[str, int], epochs: int, mode: str) -> Stamps:
    """Runs the whole service: gRPC, metrics, peers, log, one run. The lane is where `mode` says."""
    overrides = [
        f"lane.mode={mode}",
        "training.job=bench_hosting:HostedJob",
        f"training.epochs={epochs}",
        "training.threads=1",
        "fastpaths.fused=off",  # the same optimizer kernel as the bare loop has
        "service.exit_when_done=true",
        "server.listen=127.0.0.1:0",
        "metrics.listen=127.0.0.1:0",
        "logging.level=error",
        *(f"training.options.{name}={value}" for name, value in options.items()),
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ[STAMPS] = f"{folder}/stamps.json"
        try:
            if service.run(load_settings(None, [*overrides, f"state.dir={folder}/state"]), load_settings):
                raise SystemExit("the hosted run failed")
            return Stamps(**json.loads(Path(folder, "stamps.json").read_text(encoding="utf-8")))
        finally:
            del os.environ[STAMPS]


LOOPS: dict[str, Callable[[dict[str, int], int], Stamps]] = {
    "bare": partial(trained, update=bare_update),
    "careful": partial(trained, update=careful_update),
    **({"Fabric": with_fabric} if find_spec("lightning") else {}),
    **({"Accelerate": with_accelerate} if find_spec("accelerate") else {}),
    "hosted, process": partial(hosted, mode="process"),
    "hosted, thread": partial(hosted, mode="thread"),
}
CASES = {
    "tiny MLP, step of some 0.2 ms": ({"width": 32, "depth": 1, "steps": 1000}, 5, 1.10),
    "medium MLP, step of some 2 ms": ({"width": 384, "depth": 3, "steps": 200}, 5, 1.02),
    "wide MLP, step of some 10 ms": ({"width": 1024, "depth": 4, "steps": 60}, 4, 1.02),
}


def rotated(number: int) -> list[str]:
    """Returns the loops in an order in which each one has another place in every round."""
    names = list(LOOPS)
    return [*names[number % len(names) :], *names[: number % len(names)]]


def main() -> None:
    """Prints one row for each case and loop: medians, and the median of the rounds' ratios to the bare loop.

    The first round warms up and does not count.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    print(f"{len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, {rounds} rounds by turns")
    if missing := [name for name in ("lightning", "accelerate") if not find_spec(name)]:
        print(f"not installed: {', '.join(missing)}")
    print("| case | loop | step | ratio | target | with boundaries |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (options, epochs, target) in CASES.items():
        found = [{loop: LOOPS[loop](options, epochs) for loop in rotated(number)} for number in range(rounds + 1)][1:]
        for loop in LOOPS:
            step_ms = statistics.median(each[loop].step_ms() for each in found)
            ratio = statistics.median(each[loop].step_ms() / each["bare"].step_ms() for each in found)
            whole = statistics.median(each[loop].whole_ms() / each["bare"].whole_ms() for each in found)
            wanted = f"{target}" if loop.startswith("hosted") else ""
            print(f"| {name} | {loop} | {step_ms:.3f} ms | {ratio:.3f} | {wanted} | {whole:.3f} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 - a path list holds texts
    main()
