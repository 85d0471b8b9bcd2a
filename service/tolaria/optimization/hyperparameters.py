"""Changing an optimizer's hyperparameters in place by command: weight decay, betas, momentum. Never the learning rate.

Owns which names there are, their bounds and what an optimizer's state needs to go on with them.
"""

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
class _Kind:
    """Where an optimizer keeps a hyperparameter, and what it may be: 0 to `most`, which only `inclusive` is allowed."""

    option: str
    place: int | None
    most: float
    inclusive: bool

    def read(self, options: Mapping[str, Any]) -> Any:
        """The value among an optimizer's options. Raises KeyError where it has none."""
        held = options[self.option]
        return held if self.place is None else held[self.place]

    def write(self, options: dict[str, Any], value: float) -> None:
        """Set it among an optimizer's options."""
        if self.place is None:
            options[self.option] = value
        else:
            held = options[self.option]
            options[self.option] = (*held[: self.place], value, *held[self.place + 1 :])

    def why_not(self, value: float) -> str:
        """What is wrong with a value; empty when nothing is. Not a number is never in bounds."""
        if 0.0 <= value < self.most or (self.inclusive and value == self.most):
            return ""
        bounds = f"from 0 to {self.most:g}" if self.inclusive else f"at least 0 and below {self.most:g}"
        return f"must be {bounds}, is {value:g}"


# A decay shrinks weights by its product with the learning rate in every step: past 10, rates that are common for large
# batches would turn their signs. At 1 and above, momentum and averages grow without end.
_KINDS: Mapping[str, _Kind] = {
    "weight_decay": _Kind("weight_decay", None, 10.0, inclusive=True),
    "momentum": _Kind("momentum", None, 1.0, inclusive=False),
    "beta1": _Kind("betas", 0, 1.0, inclusive=False),
    "beta2": _Kind("betas", 1, 1.0, inclusive=False),
}


@dataclass(frozen=True, slots=True)
class HyperparameterChange:
    """One value of one group, before and after."""

    group: str
    name: str
    before: float
    after: float


def change_hyperparameters(
    optimizer: Optimizer, changes: Mapping[str, float], *, group: str | None = None
) -> list[HyperparameterChange]:
    """Set hyperparameters of the groups meant; all of them or, on an error, none.

    Args:
        optimizer: the live one.
        changes: by name: weight_decay (0 to 10), momentum, beta1, beta2 (each at least 0 and below 1).
        group: name of a param group or of a family of them; None for all, and then also for groups still to come.

    Returns:
        What changed, group by group; also where the value was the same already.

    Raises:
        UnknownGroupError: when no group of that name is there.
        HyperparameterError: when a name is unknown or not one of this optimizer's, or a value out of bounds.
    """
    meant = [entry for entry in optimizer.param_groups if group is None or in_family(name_of(entry), group)]
    if not meant:
        raise UnknownGroupError(group or "all", [name_of(entry) for entry in optimizer.param_groups])
    asked = list(product(meant, changes.items()))
    for entry, (name, value) in asked:
        _check(optimizer, entry, name, value)
    changed = [
        HyperparameterChange(name_of(entry), name, float(_KINDS[name].read(entry)), value)
        for entry, (name, value) in asked
    ]
    for entry, (name, value) in asked:
        _set(optimizer, entry, name, value)
    if group is None:
        for name, value in changes.items():
            _KINDS[name].write(optimizer.defaults, value)
    return changed


def _check(optimizer: Optimizer, entry: ParamGroup, name: str, value: float) -> None:
    optimizers = type(optimizer).__name__
    kind = _kind(name)
    if kind.option not in entry:
        raise HyperparameterError(name, f"{optimizers} has none")
    if isinstance(kind.read(entry), Tensor):
        raise HyperparameterError(name, f"is a tensor in this {optimizers} and fixed where it was captured")
    if problem := kind.why_not(value):
        raise HyperparameterError(name, problem)
    if name == "momentum" and value == 0.0 and entry.get("nesterov"):
        raise HyperparameterError(name, f"must stay above 0 while {optimizers} uses Nesterov's momentum")


def _kind(name: str) -> _Kind:
    if name in {"lr", "learning_rate"}:
        raise HyperparameterError(name, "is the learning-rate controller's to change")
    if name not in _KINDS:
        raise HyperparameterError(name, f"is unknown; there are {', '.join(_KINDS)}")
    return _KINDS[name]


def _set(optimizer: Optimizer, entry: ParamGroup, name: str, value: float) -> None:
    _KINDS[name].write(entry, value)
    if name == "momentum" and value > 0.0:
        _add_momentum_buffers(optimizer, entry)


def _add_momentum_buffers(optimizer: Optimizer, entry: ParamGroup) -> None:
    """RMSprop makes its buffers at a parameter's first step only, and fails without; SGD makes those it misses."""
    if isinstance(optimizer, SGD):
        return
    for parameter in entry["params"]:
        state = optimizer.state.get(parameter)
        if state and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
