"""`WeightDecaySchedule`: weight decay as a function of the step, on top of that with which the job built its groups."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer

from tolaria.config import OptimizerSettings
from tolaria.optimization.groups import ParamGroup, name_of

_OPTION = "weight_decay"


class WeightDecaySchedule:
    """Writes the weight decay of each param group before each step, unless the policy is `constant`.

    It has no state: a group's decay is a function of the step and of what the job has built.
    """

    def __init__(self, optimizer: Optimizer, settings: OptimizerSettings, run_steps: int) -> None:
        """Takes the present decays as those of step 0; for later groups, as of seeds, that is the default."""
        self._policy, self._final, self._steps = settings.weight_decay_policy, settings.weight_decay_final, run_steps
        self._built = {name_of(group): group[_OPTION] for group in optimizer.param_groups if _has_decay(group)}
        self._default = optimizer.defaults.get(_OPTION, 0.0)

    @property
    def on(self) -> bool:
        """Whether there is a schedule."""
        return self._policy != "constant"

    def factor_at(self, step: int) -> float:
        """Returns the factor of the step after `step` steps; the final one after the run's steps.

        With t the share of the run and f the final factor: 1 + (f - 1) t, or along half a cosine, as in DINO (Caron et
        al., ICCV 2021).
        """
        share = min(1.0, step / max(1, self._steps))
        if self._policy == "cosine":
            share = (1.0 - math.cos(math.pi * share)) / 2.0
        return 1.0 + (self._final - 1.0) * share

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Writes the decays of this step."""
        if not self.on:
            return
        factor = self.factor_at(step)
        for group in optimizer.param_groups:
            if _has_decay(group):
                group[_OPTION] = self._built.get(name_of(group), self._default) * factor


def _has_decay(group: ParamGroup) -> bool:
    return _OPTION in group and not isinstance(group[_OPTION], Tensor)
