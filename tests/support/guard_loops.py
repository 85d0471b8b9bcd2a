"""What guards a run without a service: bare loops with nothing, with clipping, with skipped steps, with restarts."""

from __future__ import annotations

import copy
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from support.guard_jobs import GuardJob, Trial
from tolaria.config import OptimizerSettings
from tolaria.jobs import JobContext
from tolaria.optimization.schedules import Schedule, build_schedule

RESTARTS_MAX, RESTARTS_STEPS = 3, 1000
"""Restarts after which a user gives up, as Tolaria does with rollbacks by default."""


@dataclass(slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        metric: of the last validation: accuracy, or the loss for a task without; NaN after a halt.
        losses: mean loss of each step over its sources, as it was computed.
        first_metric: that of the model before it has learned.
        halted: why it ended early; empty if it did not.
        retreats: rollbacks or restarts.
    """

    metric: float = math.nan
    losses: list[float] = field(default_factory=list)
    first_metric: float = math.nan
    halted: str = ""
    retreats: int = 0
    skipped: int = 0


class Guard:
    """No guard: takes every step."""

    def allows(self, loss: float, parameters: list[nn.Parameter]) -> bool:
        """Whether the step is taken; may change the gradients."""
        return True

    def exploded(self, loss: float) -> bool:
        """Whether the run restarts from its last checkpoint."""
        return False


class Clipping(Guard):
    """Clips the norm of the gradients at 1, the value that most recipes use."""

    def allows(self, loss: float, parameters: list[nn.Parameter]) -> bool:
        """Clips and takes the step."""
        nn.utils.clip_grad_norm_(parameters, 1.0)
        return True


class Skipping(Guard):
    """Skips a step whose loss or gradient norm is more than 6 standard deviations above the mean of the last 128.

    The rule of OLMo-core's `SkipStepOptimizer`: it begins after 64 steps, and skipped steps enter the statistics.
    Unlike there, values that are not finite stay out of them; a NaN would make it skip the next 128 steps.
    """

    WINDOW: Final = 128
    DEVIATIONS: Final = 6.0

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self.WINDOW)
        self._norms: deque[float] = deque(maxlen=self.WINDOW)

    def allows(self, loss: float, parameters: list[nn.Parameter]) -> bool:
        """Judges the step by those before it."""
        norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        usual = self._usual(loss, self._losses) and self._usual(norm, self._norms)
        self._losses.append(loss)
        self._norms.append(norm)
        return usual

    def _usual(self, value: float, before: deque[float]) -> bool:
        if len(before) < self.WINDOW // 2:
            return True
        mean = math.fsum(before) / len(before)
        variance = math.fsum((other - mean) ** 2 for other in before) / (len(before) - 1)
        return value - mean <= self.DEVIATIONS * math.sqrt(variance)


class Restarting(Guard):
    """Restarts from the last epoch's checkpoint when a loss is not finite or 10 times the mean of the last 100."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=100)

    def exploded(self, loss: float) -> bool:
        """Judges the loss by those before it."""
        if not math.isfinite(loss):
            return True
        if len(self._losses) >= 20 and loss > 10 * abs(math.fsum(self._losses) / len(self._losses)):
            return True
        self._losses.append(loss)
        return False


GUARDS: Final[dict[str, type[Guard]]] = {
    "nothing": Guard,
    "clipping": Clipping,
    "skipping": Skipping,
    "restarting": Restarting,
}


class _Loop:
    """A textbook loop over one trial."""

    def __init__(self, trial: Trial, guard: Guard, seed: int) -> None:
        self.guard, self.trial, self.outcome = guard, trial, Outcome()
        torch.manual_seed(seed)
        self.job = GuardJob(JobContext(seed, torch.device("cpu"), {"trial": trial.name}))
        self.model = self.job.build_model()
        self.optimizer = self.job.build_optimizer(self.model)
        self.cursor = self.job.training_data()
        self.rate = float(self.optimizer.param_groups[0]["lr"])
        self.schedule = self._schedule()
        self.step = self.epoch = 0
        self.restarted_at: list[int] = []

    def run(self) -> Outcome:
        """Trains to the end, or until the user gives up."""
        self.outcome.first_metric = self._validate()
        checkpoint = self._state()
        while self.epoch < self.trial.epochs and not self.outcome.halted:
            if self._epoch():
                self.epoch += 1
                checkpoint = self._state()
            elif not self.outcome.halted:
                self._restart(checkpoint)
        if not self.outcome.halted:
            self.outcome.metric = self._validate()
        return self.outcome

    def _epoch(self) -> bool:
        """Returns whether it ended without an explosion."""
        self.model.train()
        self.cursor.begin_epoch(self.epoch + 1)
        parameters = list(self.model.parameters())
        while (batch := self.cursor.next_batch()) is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * self.schedule.factor_at(self.step)
            self.optimizer.zero_grad()
            losses = self.job.losses(self.model, batch)
            total: Tensor = torch.stack(list(losses.values())).sum()
            total.backward()  # type: ignore[no-untyped-call]
            loss = total.item() / len(losses)
            self.outcome.losses.append(loss)
            if self.guard.exploded(loss):
                return False
            if self.guard.allows(loss, parameters):
                self.optimizer.step()
                self.step += 1
            else:
                self.outcome.skipped += 1
        return True

    def _restart(self, checkpoint: dict[str, Any]) -> None:
        recent = [step for step in self.restarted_at if step > self.step - RESTARTS_STEPS]
        if len(recent) >= RESTARTS_MAX:
            self.outcome.halted = f"{RESTARTS_MAX} restarts did not help"
            return
        self.restarted_at.append(self.step)
        self.outcome.retreats += 1
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        self.step = checkpoint["step"]
        torch.set_rng_state(checkpoint["rng"])

    def _state(self) -> dict[str, Any]:
        return {
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "step": self.step,
            "rng": torch.get_rng_state(),
        }

    def _schedule(self) -> Schedule:
        return build_schedule(OptimizerSettings(**self.trial.rates), self.trial.epochs * self.cursor.batches_per_epoch)

    @torch.no_grad()
    def _validate(self) -> float:
        self.model.eval()
        batch = next(iter(self.job.validation_batches()))
        found = self.job.evaluate(self.model, batch)
        return found.accuracy if self.job.task.has_accuracy else found.loss


def run_bare(trial: Trial, guard: str, seed: int = 0) -> Outcome:
    """Runs a trial in a bare loop with one of `GUARDS`."""
    loop = _Loop(trial, GUARDS[guard](), seed)
    try:
        return loop.run()
    finally:
        loop.job.close()
