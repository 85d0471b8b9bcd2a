"""Jobs with what people who train models expect: schedulers, averages, callbacks, labelled groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from support.user_jobs import Line
from tolaria.jobs import JobContext, LRSchedule

TOTAL: int = 24
"""Steps of a run of three epochs."""

SCHEDULERS: Mapping[str, Callable[[Optimizer], LRScheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda n: min(1.0, (n + 1) / 9), lambda _: 0.5]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5, 9], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, T_mult=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], optimizer=o
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=TOTAL),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=5),
}
"""Every scheduler of torch's that is not a function of evaluations, for an optimizer with two groups."""


class Scheduled(Line):
    """Two labelled groups, and a schedule. Options: scheduler, interval, monitor, early (made in build_optimizer)."""

    momentum: ClassVar[float] = 0.9

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        first, *rest = model.parameters()
        groups: list[dict[str, Any]] = [
            {"params": [first], "name": "body"},
            {"params": rest, "lr": 0.02, "name": "head"},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=self.momentum)
        self.made = SCHEDULERS[self.options["scheduler"]](optimizer) if self.options.get("early") else None
        return optimizer

    def lr_scheduler(self, optimizer: Optimizer) -> LRSchedule:
        scheduler = self.made or SCHEDULERS[self.options["scheduler"]](optimizer)
        return LRSchedule(scheduler, interval=self.options.get("interval", "step"))


class Plateau(Line):
    """Reduces its rate when `mae` does not fall; its model is too good to improve after an epoch."""

    def lr_scheduler(self, optimizer: Optimizer) -> LRSchedule:
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
        return LRSchedule(scheduler, "epoch", monitor=self.options.get("monitor", "mae"))

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        from dataclasses import replace

        x, y = batch.payload
        error = float((model(x) - y).abs().mean())
        found = super().evaluate(model, batch)  # type: ignore[no-untyped-call]
        return replace(found, metrics={"mae": error})


class Frozen(Line):
    """Trains the last layer only; the optimizer has all parameters."""

    def build_model(self) -> nn.Module:
        model: nn.Module = super().build_model()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("3."))
        return model


class Warmed(Line):
    """A function of the step."""

    def lr_scheduler(self, optimizer: Optimizer) -> Callable[[int], float]:
        del optimizer
        return lambda step: min(1.0, (step + 1) / 10)


class Returns(Line):
    """Returns something else from a method. Options: method, what."""

    GIVEN: ClassVar[Mapping[str, Callable[[Optimizer], object]]] = {
        "bare": lambda o: lr_scheduler.StepLR(o, 3),
        "number": lambda _: 0.1,
        "mapping": lambda o: {"scheduler": lr_scheduler.StepLR(o, 3)},
        "interval": lambda o: LRSchedule(lr_scheduler.StepLR(o, 3), "batch"),  # type: ignore[arg-type]
        "plateau": lambda o: LRSchedule(lr_scheduler.ReduceLROnPlateau(o), "step"),
        "other": lambda _: LRSchedule(lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], 0.1), 3), "step"),
        "nan": lambda _: lambda step: float("nan") if step else 1.0,
        "text": lambda _: lambda _step: "fast",
        "raises": lambda _: lr_scheduler.StepLR(None, 3),  # type: ignore[arg-type]
        "after": lambda o: LRSchedule(lr_scheduler.OneCycleLR(o, 0.1, total_steps=5), "step"),
        "none": lambda _: None,
    }

    def lr_scheduler(self, optimizer: Optimizer) -> object:
        return self.GIVEN[self.options["what"]](optimizer)


def context(**options: Any) -> JobContext:
    """A context of a job outside a service."""
    return JobContext(0, torch.device("cpu"), options)
