"""Param groups by name: what the optimizer shall hold, and which part each group plays. Knows no schedule, no state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import UnsuitableOptimizerError
from tolaria.values.optimization import GroupRole

HOST_GROUP = "host"

ParamGroup = dict[str, Any]
"""One entry of `Optimizer.param_groups`, which torch leaves untyped."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupPlan:
    """One param group as it shall be.

    Args:
        name: unique among the groups.
        parameters: by their full name in the model, in the order in which the optimizer shall hold them.
        role: what its learning rate follows.
        options: param-group options that differ from what a group of this name has already, or, for a new one, from the
            optimizer's defaults. `lr` is the controller's: a new group's is written at the next `apply`.
    """

    name: str
    parameters: Mapping[str, Tensor]
    role: GroupRole = GroupRole.HOST
    options: Mapping[str, Any] = field(default_factory=dict)


class OptimizerHolder(Protocol):
    """Whoever can say which optimizer is live. A rebuild replaces the object, so nobody else keeps it."""

    @property
    def optimizer(self) -> Optimizer:
        """The live one."""
        ...


def name_groups(optimizer: Optimizer) -> None:
    """Give every param group without a name one: "host", or "host/0", "host/1" and so on where there are several.

    Raises:
        UnsuitableOptimizerError: when a group has no `lr`, or two have the same name.
    """
    groups: list[ParamGroup] = optimizer.param_groups
    for place, group in enumerate(groups):
        group.setdefault("name", HOST_GROUP if len(groups) == 1 else f"{HOST_GROUP}/{place}")
        if "lr" not in group:
            raise UnsuitableOptimizerError(
                f"{type(optimizer).__name__}: param group {group['name']!r} has no lr, so there is nothing to govern"
            )
    names = [group["name"] for group in groups]
    if len(set(names)) < len(names):
        raise UnsuitableOptimizerError(f"{type(optimizer).__name__}: param groups share names: {', '.join(names)}")


def name_of(group: ParamGroup) -> str:
    """The group's name.

    Raises:
        UnsuitableOptimizerError: when it has none; `name_groups` gave it one once.
    """
    name = group.get("name")
    if not isinstance(name, str):
        raise UnsuitableOptimizerError("a param group without a name has come into the optimizer")
    return name
