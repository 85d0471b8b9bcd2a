"""Changing an optimizer's hyperparameters in place by command: weight decay, betas, momentum. Never the learning rate.

Owns which names there are, their bounds and what an optimizer's state needs to go on with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from tolaria.errors import HyperparameterError, UnknownGroupError
from tolaria.optimization.adjustments import in_family
from tolaria.optimization.groups import ParamGroup, name_of

_BETAS = {"beta1": 0, "beta2": 1}
_OPTION_OF = {"weight_decay": "weight_decay", "momentum": "momentum", "beta1": "betas", "beta2": "betas"}


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
        changes: by name: weight_decay (at least 0), momentum, beta1, beta2 (each at least 0 and below 1).
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
    for name, value in changes.items():
        for entry in meant:
            _check(optimizer, entry, name, value)
    changed = [
        HyperparameterChange(name_of(entry), name, _get(entry, name), value)
        for entry in meant
        for name, value in changes.items()
    ]
    for name, value in changes.items():
        for entry in meant:
            _set(entry, name, value)
            if name == "momentum" and value > 0.0:
                _add_momentum_buffers(optimizer, entry)
        if group is None:
            _set(optimizer.defaults, name, value)
    return changed


def _check(optimizer: Optimizer, entry: ParamGroup, name: str, value: float) -> None:
    kind = type(optimizer).__name__
    if name in {"lr", "learning_rate"}:
        raise HyperparameterError(name, "is the learning-rate controller's to change")
    if name not in _OPTION_OF:
        raise HyperparameterError(name, f"is unknown; there are {', '.join(_OPTION_OF)}")
    option = _OPTION_OF[name]
    if option not in entry:
        raise HyperparameterError(name, f"{kind} has none")
    held = entry[option] if option != "betas" else entry[option][_BETAS[name]]
    if isinstance(held, Tensor):
        raise HyperparameterError(name, f"is a tensor in this {kind} and fixed where it was captured")
    most = math.inf if name == "weight_decay" else 1.0
    if not (math.isfinite(value) and 0.0 <= value < most):
        raise HyperparameterError(name, f"must be finite, at least 0{'' if most > 1.0 else ' and below 1'}, is {value}")
    if name == "momentum" and value == 0.0 and entry.get("nesterov"):
        raise HyperparameterError(name, f"must stay above 0 while {kind} uses Nesterov's momentum")


def _get(options: Mapping[str, Any], name: str) -> float:
    held = options[_OPTION_OF[name]]
    return float(held[_BETAS[name]] if name in _BETAS else held)


def _set(options: dict[str, Any], name: str, value: float) -> None:
    option = _OPTION_OF[name]
    if name in _BETAS:
        betas = list(options[option])
        betas[_BETAS[name]] = value
        options[option] = tuple(betas)
    else:
        options[option] = value


def _add_momentum_buffers(optimizer: Optimizer, entry: ParamGroup) -> None:
    """RMSprop makes its buffers at a parameter's first step only, and fails without; SGD makes those it misses."""
    if isinstance(optimizer, SGD):
        return
    for parameter in entry["params"]:
        state = optimizer.state.get(parameter)
        if state and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
