"""Param groups: their names, plans of them, and the learning rates written into them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import UnsuitableOptimizerError
from tolaria.values.optimization import GroupRole, LearningRateViolation

_RELATIVE_TOLERANCE: Final = 1e-6
"""Rates that differ by less are equal: a rate in a float32 tensor is rounded."""

_NAME_MAX: Final = 100

SEED_GROUP: Final = "seed:"
"""Prefix of the names of the param groups of seeds."""

ParamGroup = dict[str, Any]
"""One entry of `Optimizer.param_groups`, which torch leaves untyped."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupPlan:
    """A param group that an optimizer is to have.

    Args:
        name: unique among the groups.
        parameters: by their full name in the model, in the order of the optimizer.
        role: how its learning rate is set.

    A known group keeps its options; a new one takes the optimizer's defaults, and its `lr` is written by the
    controller at the next `apply`.
    """

    name: str
    parameters: Mapping[str, Tensor]
    role: GroupRole = GroupRole.HOST


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in whatever order of the dimensions.

    Only then do a tensor's gradient and moments, as autograd and optimizers allocate them, have its strides.
    """
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride() == tensor.stride()


def name_groups(optimizer: Optimizer) -> None:
    """Names every param group without a name: "host", or "host/0", "host/1" and so on for several groups.

    Raises:
        UnsuitableOptimizerError: a group has no `lr`, or two have the same name.
    """
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    for index, group in enumerate(groups):
        name = group.setdefault("name", "host" if len(groups) == 1 else f"host/{index}")
        if "lr" not in group:
            raise UnsuitableOptimizerError(f"{kind}: param group {name!r} has no lr to control")
    names = [group["name"] for group in groups]
    if len(set(names)) < len(names):
        raise UnsuitableOptimizerError(f"{kind}: param groups share names: {', '.join(names)}")


def check_given_names(optimizer: Optimizer) -> None:
    """Raises UnsuitableOptimizerError for a name that a job has given to a group, and that it cannot have."""
    for index, group in enumerate(optimizer.param_groups):
        if problem := _name_problem(group.get("name", "host")):
            named = f"the name of param group {index}, {group['name']!r}, {problem}"
            raise UnsuitableOptimizerError(f"{type(optimizer).__name__}: {named}")


def _name_problem(name: object) -> str:
    """Returns why a job's group cannot have this name, which is a label of metrics and a word of commands."""
    if not isinstance(name, str) or not name or len(name) > _NAME_MAX:
        return f"is not a text of 1 to {_NAME_MAX} characters"
    return f"begins as those of seeds do: {SEED_GROUP}" if name.startswith(SEED_GROUP) else ""


def name_of(group: ParamGroup) -> str:
    """Returns the name of a group; raises UnsuitableOptimizerError for one that was added without a name."""
    name = group.get("name")
    if not isinstance(name, str):
        raise UnsuitableOptimizerError("the optimizer has a param group without a name")
    return name


def rate_in(group: ParamGroup) -> float:
    """Returns the group's rate; NaN if it is not a number. Reading a tensor synchronises with its device."""
    present = group.get("lr")
    if isinstance(present, Tensor) and present.numel() == 1:
        return float(present.item())
    return float(present) if isinstance(present, (int, float)) else math.nan


def has_scheduler(optimizer: Optimizer) -> bool:
    """Whether a scheduler of torch's has been made for the optimizer: all but ReduceLROnPlateau mark its `step`."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


def base_rate_in(group: ParamGroup) -> float:
    """Returns the rate with which the job built the group: a scheduler of torch's keeps it as `initial_lr`."""
    return rate_in({"lr": group["initial_lr"]} if "initial_lr" in group else group)


@dataclass(frozen=True, slots=True)
class _Written:
    """The rate that was last written into a group.

    A tensor's version counts writes without reading it, except those through `.data`. A tensor on the CPU is read as
    well, so that a write through `.data` can be missed only on a device.
    """

    rate: float
    tensor: Tensor | None = None
    version: int = 0
    stored: float | None = None

    def matches(self, group: ParamGroup) -> bool:
        present = group.get("lr")
        if isinstance(present, Tensor):
            return present is self.tensor and (_version(present), _cpu_value(present)) == (self.version, self.stored)
        return self.tensor is None and bool(present == self.rate)


class RateWriter:
    """Writes learning rates into param groups and detects other writes.

    A rate that is a tensor (as captured steps need) is filled in place. Synchronises only where a tensor was changed
    by other code.
    """

    def __init__(self) -> None:
        self._written: dict[str, _Written] = {}

    @property
    def rates(self) -> dict[str, float]:
        """The rates last written, by group."""
        return {name: written.rate for name, written in self._written.items()}

    def write(self, group: ParamGroup, rate: float) -> None:
        """Sets the group's rate, unless it is set already."""
        written = self._written.get(name_of(group))
        if written is None or written.rate != rate or not written.matches(group):
            self._put(group, rate)

    def restore(self, group: ParamGroup) -> LearningRateViolation | None:
        """Restores the rate last written; returns a violation if the present one differed by more than 1e-6 of it."""
        written = self._written.get(name_of(group))
        if written is None or written.matches(group):
            return None
        found = rate_in(group)
        self._put(group, written.rate)
        if math.isclose(found, written.rate, rel_tol=_RELATIVE_TOLERANCE):
            return None
        return LearningRateViolation(name_of(group), written.rate, found)

    def forget(self, name: str) -> None:
        """Drops the entry of a group that was removed."""
        self._written.pop(name, None)

    def _put(self, group: ParamGroup, rate: float) -> None:
        name, present = name_of(group), group.get("lr")
        if name in self._written:
            tensor = self._written[name].tensor
        else:  # torch lets all groups share the default's tensor
            tensor = present.detach().clone() if isinstance(present, Tensor) else None
        if tensor is None:
            group["lr"] = rate
            self._written[name] = _Written(rate)
        else:
            tensor.fill_(rate)
            group["lr"] = tensor
            self._written[name] = _Written(rate, tensor, _version(tensor), _cpu_value(tensor))


def _version(tensor: Tensor) -> int:
    return tensor._version  # noqa: SLF001 - the only sign of a write that does not need a read


def _cpu_value(tensor: Tensor) -> float | None:
    """Returns the value of a CPU tensor, in its precision; None on a device."""
    return float(tensor.item()) if tensor.device.type == "cpu" else None
