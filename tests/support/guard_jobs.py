"""The jobs of the trial of guards: sound ones, and ill ones with a fault injected while they train.

A fault of the data is in the batches, so that it is there again after a rollback. Every other fault happens once, by
the number of calls of `losses`, as a slip of an operator or a flipped bit does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from support.guard_tasks import TASKS, Task
from tolaria.jobs import HOST, Batch, CursorState, Evaluation, JobContext

HUGE: Final = 1e4
"""Factor of a huge sample, and about the weight that a flipped bit leaves behind."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong.

    Attributes:
        kind: nan_sample, huge_sample, bad_gradient, slip, growth, shard, nan_shard or bit_flip.
        at: call of `losses` at which it happens; for shards the epoch.
        factor: of the learning rate, at once (slip) or in each further step (growth).
        steps: calls, or batches of a shard, for which it lasts.
    """

    kind: str
    at: int = 0
    factor: float = 1.0
    steps: int = 1


@dataclass(frozen=True, slots=True)
class Trial:
    """One run.

    Attributes:
        task: name in `TASKS`.
        options: of the task, and: optimizer (sgd, adam, adamw, rmsprop), lr, momentum, batch, order (shuffled, blocks),
            block (samples), grows_at (epoch from which all classes are in the data), announced.
        rates: settings of the learning rate's schedule.
    """

    name: str
    task: str
    epochs: int
    options: Mapping[str, Any] = field(default_factory=dict)
    fault: Fault | None = None
    rates: Mapping[str, Any] = field(default_factory=dict)


class TrialCursor:
    """Batches of a task in the order that the trial names, with the faults of its data."""

    def __init__(self, task: Task, trial: Trial, context: JobContext) -> None:
        self._task, self._trial, self._context = task, trial, context
        self._size = int(trial.options.get("batch", 32))
        self._epoch = self._index = 0
        self._chunks: tuple[Tensor, ...] = ()

    @property
    def batches_per_epoch(self) -> int:
        """The same in each epoch."""
        return -(-len(self._task.train[0]) // self._size)

    def begin_epoch(self, epoch: int) -> None:
        """Orders the data."""
        generator = torch.Generator().manual_seed(self._context.seed * 1000 + epoch)
        self._chunks = torch.split(self._order(epoch, generator), self._size)
        self._epoch, self._index = epoch, 0

    def next_batch(self) -> Batch | None:
        """Returns the next batch, corrupted if its place is."""
        if self._index >= len(self._chunks):
            return None
        if self._index == 0 and self._epoch == self._trial.options.get("grows_at") and self._announced:
            self._context.new_regime("all classes from here on")
        parts = tuple(tensor[self._chunks[self._index]] for tensor in self._task.train)
        parts = self._corrupted(parts)
        self._index += 1
        return Batch(parts, len(parts[0]))

    def state_dict(self) -> CursorState:
        """Returns the position."""
        return {"epoch": self._epoch, "index": self._index}

    def load_state_dict(self, state: CursorState) -> None:
        """Moves to a position."""
        epoch, index = int(str(state["epoch"])), int(str(state["index"]))
        if epoch:
            self.begin_epoch(epoch)
        self._epoch, self._index = epoch, index

    @property
    def _announced(self) -> bool:
        return bool(self._trial.options.get("announced"))

    def _order(self, epoch: int, generator: torch.Generator) -> Tensor:
        samples, labels = len(self._task.train[0]), self._task.labels
        if labels is None:
            return torch.randperm(samples, generator=generator)
        if self._trial.options.get("order") == "blocks":
            blocks = torch.split(labels.argsort(stable=True), int(self._trial.options.get("block", 64)))
            return torch.cat([blocks[i] for i in torch.randperm(len(blocks), generator=generator).tolist()])
        order = torch.randperm(samples, generator=generator)
        if epoch < int(self._trial.options.get("grows_at", 0)):
            few = order[labels[order] < 5]
            order = few.repeat(math.ceil(samples / len(few)))[:samples]
        return order

    def _corrupted(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        fault = self._trial.fault
        if fault is None or fault.kind not in {"shard", "nan_shard"}:
            return parts
        place = (self._epoch - fault.at) * len(self._chunks) + self._index
        if not 0 <= place < fault.steps:
            return parts
        if fault.kind == "nan_shard":
            return (parts[0] * math.nan, *parts[1:])
        return self._task.noise(parts, torch.Generator().manual_seed(place))


class GuardJob:
    """A trial as a job. Option `trial` is the name of one of `TRIALS`."""

    def __init__(self, context: JobContext) -> None:
        self.trial = TRIALS[str(context.options["trial"])]
        self.task = TASKS[self.trial.task](self.trial.options)
        self.context, self.calls = context, 0
        self._parameters: list[nn.Parameter] = []
        self._hooks: list[RemovableHandle] = []
        self._poison_data()

    def build_model(self) -> nn.Module:
        """Returns the task's model."""
        model = self.task.model()
        self._parameters = list(model.parameters())
        fault = self.trial.fault
        if fault is not None and fault.kind in {"slip", "growth"}:
            hooked = register_optimizer_step_pre_hook(self._raise_rates), register_optimizer_step_post_hook(self._end)
            self._hooks += hooked
        return model

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns the trial's optimizer."""
        options = self.trial.options
        rate = float(options.get("lr", 1e-3))
        match options.get("optimizer", "adam"):
            case "sgd":
                return torch.optim.SGD(model.parameters(), lr=rate, momentum=float(options.get("momentum", 0.9)))
            case "rmsprop":
                return torch.optim.RMSprop(model.parameters(), lr=rate)
            case "adamw":
                return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
            case _:
                return torch.optim.Adam(model.parameters(), lr=rate)

    def training_data(self) -> TrialCursor:
        """Returns the batches."""
        return TrialCursor(self.task, self.trial, self.context)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Returns the task's losses; this is where bits flip and gradients become infinite."""
        self.calls += 1
        fault = self.trial.fault
        now = fault is not None and self.calls == fault.at
        if now and fault is not None and fault.kind == "bit_flip":
            with torch.no_grad():
                self._parameters[0].view(-1)[3] = 3e4
        losses = self.task.losses(model, batch.payload)
        if now and fault is not None and fault.kind == "bad_gradient":
            losses[HOST].register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
        return losses

    def validation_batches(self) -> Iterable[Batch]:
        """Returns one batch of all held-out samples."""
        return [Batch(self.task.held_out, len(self.task.held_out[0]))]

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """Validates."""
        mean, right = self.task.validate(model, batch.payload)
        return Evaluation(mean * batch.samples, right, batch.samples)

    def close(self) -> None:
        """Removes the hooks, which are the process's."""
        for hook in self._hooks:
            hook.remove()

    def _poison_data(self) -> None:
        fault = self.trial.fault
        if fault is not None and fault.kind in {"nan_sample", "huge_sample"}:
            self.task.train[0][7] *= math.nan if fault.kind == "nan_sample" else HUGE

    def _factor(self) -> float:
        """Returns the factor on the learning rate, by the calls since the fault began."""
        fault = self.trial.fault
        if fault is None or not 0 <= self.calls - fault.at < fault.steps:
            return 1.0
        return fault.factor if fault.kind == "slip" else fault.factor ** (self.calls - fault.at)

    def _raise_rates(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._scale_rates(optimizer, self._factor())

    def _end(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._scale_rates(optimizer, None)

    def _scale_rates(self, optimizer: torch.optim.Optimizer, factor: float | None) -> None:
        """Multiplies the rates for the duration of a step; None puts them back exactly."""
        if not any(optimizer.param_groups[0]["params"][0] is mine for mine in self._parameters):
            return
        for group in optimizer.param_groups:
            if factor is None:
                group["lr"] = group.pop("lr_without_fault")
            else:
                group["lr_without_fault"], group["lr"] = group["lr"], group["lr"] * factor


def _digits(name: str, epochs: int, *, rates: Mapping[str, Any] | None = None, **options: Any) -> Trial:
    return Trial(name, "digits", epochs, options, rates=rates or {})


def _warm_restarts(steps: int) -> dict[str, Any]:
    return {"policy": "cosine", "period_steps": steps, "after_period": "restart"}


SOUND: Final[tuple[Trial, ...]] = (
    _digits("SGD, batch 8", 8, optimizer="sgd", lr=0.03, batch=8),
    _digits("SGD, batch 4", 4, optimizer="sgd", lr=0.01, batch=4),
    _digits("SGD, batch 2", 2, optimizer="sgd", lr=0.005, batch=2),
    _digits("SGD, batch 512", 200, optimizer="sgd", lr=0.1, batch=512),
    _digits("SGD without momentum, batch 16", 14, optimizer="sgd", momentum=0.0, lr=0.1, batch=16),
    _digits("SGD with BatchNorm, batch 8", 8, optimizer="sgd", lr=0.02, batch=8, norm=True),
    _digits("Adam, batch 32", 32, lr=1e-3, batch=32),
    _digits("Adam, batch 4", 4, lr=1e-3, batch=4),
    _digits("Adam, batch 512", 200, lr=3e-3, batch=512),
    _digits("RMSprop, batch 16", 14, optimizer="rmsprop", lr=1e-3, batch=16),
    _digits("Adam, dropout 0.3", 32, lr=3e-3, dropout=0.3, batch=32),
    _digits("SGD, dropout 0.5, batch 8", 8, optimizer="sgd", lr=0.03, dropout=0.5, batch=8),
    _digits("Adam, 20 % wrong labels", 32, lr=3e-3, label_noise=0.2, batch=32),
    _digits("SGD, 20 % wrong labels, batch 8", 8, optimizer="sgd", lr=0.02, label_noise=0.2, batch=8),
    _digits("SGD, warm restarts", 32, optimizer="sgd", lr=0.1, batch=32, rates=_warm_restarts(410)),
    _digits("Adam, warm restarts", 32, lr=1e-2, batch=32, rates=_warm_restarts(410)),
    _digits("SGD, data sorted in blocks", 16, optimizer="sgd", lr=0.01, batch=16, order="blocks", block=32),
    _digits("Adam, data sorted in blocks", 16, lr=1e-3, batch=16, order="blocks", block=128),
    _digits("curriculum, announced", 32, lr=1e-3, batch=32, grows_at=16, announced=True),
    _digits("curriculum, not announced", 32, lr=1e-3, batch=32, grows_at=16),
    Trial("bandit, loss around zero", "bandit", 32, {"lr": 3e-3, "batch": 32}),
    Trial("density, negative loss", "density", 40, {"lr": 1e-3, "batch": 32}),
    Trial("hinge, loss becomes zero", "hinge", 24, {"optimizer": "sgd", "lr": 0.02, "batch": 16}),
    Trial("regression without noise", "line", 40, {"optimizer": "sgd", "lr": 0.02, "batch": 32}),
    Trial("four conflicting tasks", "conflict", 24, {"optimizer": "sgd", "lr": 0.002, "batch": 16}),
    Trial("character GPT", "gpt", 12, {"optimizer": "adamw", "lr": 3e-3, "batch": 16}, rates={"warmup_steps": 50}),
    Trial("variational autoencoder", "vae", 32, {"lr": 2e-3, "batch": 32}),
    Trial("two adversaries", "adversaries", 48, {"lr": 1e-3, "batch": 32}),
    Trial("student of its own average", "student", 48, {"lr": 1e-3, "batch": 32}),
    Trial("temporal differences", "values", 64, {"lr": 2e-3, "batch": 32}),
    Trial("targets that grow, evaluated every two steps", "values", 600, {"lr": 1e-3, "batch": 512}),
    Trial("adversaries that oscillate", "adversaries", 200, {"lr": 1e-3, "batch": 128}),
)
"""Runs in which nothing is wrong.

One rollback is allowed in the curriculum that is not announced, and in the last two, whose losses rise by themselves.
"""

CLEAN: Final[tuple[Trial, ...]] = (
    _digits("MLP, Adam", 36, lr=2e-3, batch=32),
    _digits("MLP, SGD", 18, optimizer="sgd", lr=0.03, batch=16, width=128),
    Trial("GPT, AdamW", "gpt", 13, {"optimizer": "adamw", "lr": 3e-3, "batch": 16}),
)
"""The runs in which faults are injected."""


def _faults(trial: Trial) -> dict[str, Fault]:
    """Returns the faults by name, each some way into the run."""
    at = {"MLP, Adam": 500, "MLP, SGD": 500, "GPT, AdamW": 350}[trial.name]
    epoch = {"MLP, Adam": 13, "MLP, SGD": 7, "GPT, AdamW": 6}[trial.name]
    return {
        "one NaN sample": Fault("nan_sample"),
        "infinite gradient": Fault("bad_gradient", at),
        "huge sample": Fault("huge_sample"),
        "rate x 10": Fault("slip", at, 10.0, 15),
        "rate x 100": Fault("slip", at, 100.0, 15),
        "rate x 500": Fault("slip", at, 500.0, 15),
        "rate grows 2 % a step": Fault("growth", at, 1.02, 250),
        "30 corrupt batches": Fault("shard", epoch, steps=30),
        "30 NaN batches": Fault("nan_shard", epoch, steps=30),
        "bit flip": Fault("bit_flip", at),
    }


ILL: Final[tuple[Trial, ...]] = tuple(
    Trial(f"{clean.name}: {name}", clean.task, clean.epochs, clean.options, fault, clean.rates)
    for clean in CLEAN
    for name, fault in _faults(clean).items()
)
"""Runs in which something goes wrong."""

TRIALS: Final[Mapping[str, Trial]] = {trial.name: trial for trial in (*SOUND, *CLEAN, *ILL)}
