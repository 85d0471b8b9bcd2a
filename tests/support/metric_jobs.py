"""A job that adds metrics, in evaluations and in steps."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from support.jobs import RandomisedJob, TinyJob
from tolaria.jobs import Batch, Evaluation, JobContext, Ratio


class MetricsJob(TinyJob):
    """Counts no accuracy. The option `logs` is the name of a metric that it logs in each step."""

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self.name = str(context.options.get("logs", "size"))

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        losses = super().losses(model, batch)
        self.context.log(self.name, losses["host"] * 0 + 2.0)
        self.context.log("batch.samples", batch.samples)
        return losses

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        found = super().evaluate(model, batch)
        metrics: dict[str, float | Ratio] = {
            "ppl": Ratio(found.loss_sum, batch.samples, exponential=True),
            "mae": float((model(batch.payload[0]) - batch.payload[1]).abs().mean()),
        }
        return Evaluation(found.loss_sum, samples=batch.samples, metrics=metrics)


class WrongMetricsJob(TinyJob):
    """Returns metrics that `options.metrics` names as Python text."""

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        found = super().evaluate(model, batch)
        wrong = {
            "list": [1.0],
            "name": {"a b": 1.0},
            "reserved": {"loss": 1.0},
            "text": {"f1": "high"},
            "tensor": {"f1": torch.zeros(2)},
            "ratio": {"f1": Ratio(1.0, torch.zeros(2))},  # type: ignore[arg-type]
            "many": {f"m{number}": 1.0 for number in range(65)},
        }
        return Evaluation(found.loss_sum, 0, batch.samples, wrong[str(self.context.options["wrong"])])  # type: ignore[arg-type]


class UnhurriedJob(RandomisedJob):
    """Takes 10 ms for a step, and logs a metric in every third."""

    steps = 0

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        time.sleep(0.01)
        UnhurriedJob.steps += 1
        if UnhurriedJob.steps % 3 == 0:
            self.context.log("thirds", float(UnhurriedJob.steps))
        return super().losses(model, batch)
