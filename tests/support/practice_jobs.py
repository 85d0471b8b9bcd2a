"""Jobs with what people who train models expect: schedulers, averages, callbacks, labelled groups."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import softplus
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from support.user_jobs import Line
from tolaria.jobs import HOST, Callback, Evaluation, JobContext, LRSchedule, RunView

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


class Recorder:
    """Writes what it is told to a file, and counts what has happened to this state of training."""

    def __init__(self, context: JobContext) -> None:
        self.context, self.counts = context, dict.fromkeys(("begun", "steps", "epochs", "evaluations", "rollbacks"), 0)
        self.loss_sum = torch.zeros(())
        self.seen: list[tuple[Any, ...]] = []

    def on_train_begin(self, run: RunView) -> None:
        self.counts["begun"] += 1
        torch.rand(3)  # which must not be seen in the random numbers of training
        self.seen.append(("begin", run.step, run.epoch))

    def on_step_end(self, run: RunView, loss: float) -> None:
        self.counts["steps"] += 1
        self.loss_sum = self.loss_sum + loss
        self.seen.append(("step", run.step, self.context.step))
        if self.context.options.get("raises") == run.step:
            raise ValueError(f"cannot log step {run.step}")

    def on_epoch_end(self, run: RunView, loss: float) -> None:
        self.counts["epochs"] += 1
        self.seen.append(("epoch", run.epoch, loss))

    def on_evaluate(self, run: RunView, metrics: Mapping[str, float]) -> None:
        self.counts["evaluations"] += 1
        self.seen.append(("evaluate", run.epoch, sorted(metrics)))

    def on_rollback(self, run: RunView, from_step: int) -> None:
        self.counts["rollbacks"] += 1
        torch.rand(3)
        self.seen.append(("rollback", from_step, run.step))

    def on_train_end(self, run: RunView) -> None:
        self.seen.append(("end", run.step, dict(run.learning_rates)))

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "loss_sum": self.loss_sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts, self.loss_sum = dict(state["counts"]), state["loss_sum"]


class Plain(Callback):
    """Keeps no state."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, run: RunView, loss: float) -> None:
        self.steps += run.model is not None


class Misspelled(Callback):
    """Has a method that is never called."""

    def on_step_ended(self, run: RunView) -> None:
        raise AssertionError


class Called(Line):
    """Has callbacks. Options: callbacks (Misspelled, text, number, half), raises (a step)."""

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)  # type: ignore[no-untyped-call]
        self.context = context
        self.recorder, self.plain = Recorder(context), Plain()

    def callbacks(self) -> Any:
        match self.options.get("callbacks"):
            case "Misspelled":
                return [Misspelled()]
            case "text":
                return "recorder"
            case "number":
                return [3]
            case "half":
                half = Recorder(self.context)
                return [type("Half", (), {"on_step_end": half.on_step_end, "state_dict": half.state_dict})()]
            case "raising":
                raise OSError("no such file")
            case _:
                return [self.recorder, self.plain, Recorder(self.context)]


class Practised(Called):
    """One cycle by step, callbacks with state, two groups; dies once by SIGKILL. Options: at (a call of losses)."""

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        first, *rest = model.parameters()
        groups = [{"params": [first], "name": "body"}, {"params": rest, "name": "head"}]
        return torch.optim.Adam(groups, lr=0.01)

    def lr_scheduler(self, optimizer: Optimizer) -> LRSchedule:
        total = self.context.total_steps
        return LRSchedule(lr_scheduler.OneCycleLR(optimizer, [0.01, 0.02], total_steps=total), "step")

    def losses(self, model: nn.Module, batch: Any) -> Any:
        marker = Path("died")
        if self.calls + 1 == self.options.get("at") and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(model, batch)  # type: ignore[no-untyped-call]


class Scored(Line):
    """Its metric `score` is that of a list by epoch. Options: scores."""

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)  # type: ignore[no-untyped-call]
        self.context = context

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        found = super().evaluate(model, batch)  # type: ignore[no-untyped-call]
        scores = self.options["scores"]
        score = scores[min(max(self.context.epoch, 1), len(scores)) - 1]
        return replace(found, metrics={} if score is None else {"score": float(score)})


class Adversarial(Line):
    """Two networks that are trained against each other, as the guide describes. Options: optimizers."""

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)  # type: ignore[no-untyped-call]
        self.context = context

    def build_model(self) -> nn.Module:
        return nn.ModuleDict({"generator": nn.Linear(16, 4), "critic": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))})

    def build_optimizer(self, model: nn.Module) -> Any:
        assert isinstance(model, nn.ModuleDict)
        groups = [{"params": model[name].parameters(), "name": name} for name in model]
        optimizer = torch.optim.Adam(groups, lr=0.01, betas=(0.5, 0.999))
        several = {"list": [optimizer, optimizer], "mapping": {"g": optimizer, "d": optimizer}, "none": None}
        return several.get(self.options.get("optimizers", ""), optimizer)

    def losses(self, model: nn.Module, batch: Any) -> Any:
        assert isinstance(model, nn.ModuleDict)
        real, _ = batch.payload
        generator, critic = model["generator"], model["critic"]
        fake = generator(torch.randn(len(real), 16))
        losses = {HOST: softplus(-critic(real)).mean() + softplus(critic(fake.detach())).mean()}
        if self.context.step % 5 == 0:
            fixed = {name: parameter.detach() for name, parameter in critic.named_parameters()}
            losses["generator"] = softplus(-torch.func.functional_call(critic, fixed, (fake,))).mean()
        return losses

    def evaluate(self, model: nn.Module, batch: Any) -> Evaluation:
        assert isinstance(model, nn.ModuleDict)
        return Evaluation(float(softplus(-model["critic"](batch.payload[0])).sum()), None, batch.samples)


class Named(Line):
    """A param group with a name that it cannot have. Options: name."""

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        groups = [{"params": list(model.parameters()), "name": self.options["name"]}]
        return torch.optim.SGD(groups, lr=0.01, weight_decay=0.1)
