"""Changes of an optimizer's weight decay, betas and momentum in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from tolaria.errors import HyperparameterError, UnknownGroupError
from tolaria.optimization.groups import ParamGroup, name_of
from tolaria.values.optimization import in_family


@dataclass(frozen=True, slots=True)
class _Hyperparameter:
    """The option that holds a hyperparameter, its index in it, and its bounds: 0 to `most`, which may be included."""

    option: str
    index: int | None
    most: float
    inclusive: bool

    def read(self, options: Mapping[str, Any]) -> Any:
        held = options[self.option]
        return held if self.index is None else held[self.index]

    def write(self, options: dict[str, Any], value: float) -> None:
        held = options[self.option]
        if self.index is not None:
            options[self.option] = (*held[: self.index], value, *held[self.index + 1 :])
        else:
            options[self.option] = value

    def problem(self, value: float) -> str | None:
        """Returns why a value is out of bounds, as NaN always is; None if it is not."""
        if 0.0 <= value < self.most or (self.inclusive and value == self.most):
            return None
        bounds = f"from 0 to {self.most:g}" if self.inclusive else f"at least 0 and below {self.most:g}"
        return f"must be {bounds}, is {value:g}"


# A decay shrinks weights by its product with the learning rate in every step: above 10, rates that are common for
# large batches would change their signs. At 1 and above, momentum and averages grow without end.
_HYPERPARAMETERS: Mapping[str, _Hyperparameter] = {
    "weight_decay": _Hyperparameter("weight_decay", None, 10.0, inclusive=True),
    "momentum": _Hyperparameter("momentum", None, 1.0, inclusive=False),
    "beta1": _Hyperparameter("betas", 0, 1.0, inclusive=False),
    "beta2": _Hyperparameter("betas", 1, 1.0, inclusive=False),
}


@dataclass(frozen=True, slots=True)
class HyperparameterChange:
    """One hyperparameter of one group, before and after."""

    group: str
    name: str
    before: float
    after: float


def change_hyperparameters(
    optimizer: Optimizer, changes: Mapping[str, float], *, group: str | None = None
) -> list[HyperparameterChange]:
    """Sets hyperparameters of param groups; all of them or, on an error, none.

    Args:
        optimizer: an optimizer whose groups are named.
        changes: by name: weight_decay (0 to 10), momentum, beta1, beta2 (each at least 0 and below 1).
        group: a param group or a family of them; None: all groups, and the defaults of later ones.

    Returns:
        The changes group by group, including those to an equal value.

    Raises:
        UnknownGroupError: there is no such group.
        HyperparameterError: a name is unknown or not one of this optimizer's, or a value is out of bounds.
    """
    groups = [entry for entry in optimizer.param_groups if group is None or in_family(name_of(entry), group)]
    if not groups:
        raise UnknownGroupError(group or "all", [name_of(entry) for entry in optimizer.param_groups])
    pairs = list(product(groups, changes.items()))
    for entry, (name, value) in pairs:
        _check(optimizer, entry, name, value)
    changed = [
        HyperparameterChange(name_of(entry), name, float(_HYPERPARAMETERS[name].read(entry)), value)
        for entry, (name, value) in pairs
    ]
    for entry, (name, value) in pairs:
        _HYPERPARAMETERS[name].write(entry, value)
        if name == "momentum" and value > 0.0:
            _add_momentum_buffers(optimizer, entry)
    if group is None:
        for name, value in changes.items():
            _HYPERPARAMETERS[name].write(optimizer.defaults, value)
    return changed


def _check(optimizer: Optimizer, entry: ParamGroup, name: str, value: float) -> None:
    if name in {"lr", "learning_rate"}:
        raise HyperparameterError(name, "is set by the learning-rate controller")
    if name not in _HYPERPARAMETERS:
        raise HyperparameterError(name, f"is unknown; there are {', '.join(_HYPERPARAMETERS)}")
    kind, hyperparameter = type(optimizer).__name__, _HYPERPARAMETERS[name]
    if hyperparameter.option not in entry:
        raise HyperparameterError(name, f"{kind} has none")
    if isinstance(hyperparameter.read(entry), Tensor):
        raise HyperparameterError(name, f"is a tensor in this {kind}, and fixed in captured steps")
    if problem := hyperparameter.problem(value):
        raise HyperparameterError(name, problem)
    if name == "momentum" and value == 0.0 and entry.get("nesterov"):
        raise HyperparameterError(name, f"must stay above 0 while {kind} uses Nesterov's momentum")


def _add_momentum_buffers(optimizer: Optimizer, entry: ParamGroup) -> None:
    """Adds missing buffers: unlike SGD, other optimizers create them at a parameter's first step only."""
    if isinstance(optimizer, SGD):
        return
    for parameter in entry["params"]:
        state = optimizer.state.get(parameter)
        if state and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
