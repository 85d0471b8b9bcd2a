"""The rig as the one definition of the training state sees it: which objects are its pieces.

Owns the list of the pieces. Must not know when the state is captured or brought back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import JsonValue
from torch import nn

from tolaria.errors import StateMismatchError, TopologyStateError
from tolaria.images.image import StateImage
from tolaria.optimization import GroupPlan
from tolaria.state.encoding import decode_plain
from tolaria.state.training_state import StatePart, TrainingState
from tolaria.training.growth import Growth
from tolaria.training.rig import Rig
from tolaria.values.optimization import GroupRole
from tolaria.values.training import Position


class LiveRig:
    """`LiveTraining` over a rig; always the objects that are live now."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    @property
    def model(self) -> nn.Module:
        """With its seeds."""
        return self._rig.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Another one after a rebuild."""
        return self._rig.optimizer

    @property
    def position(self) -> Position:
        """Updates done, and the epoch."""
        return Position(self._rig.global_step, self._rig.epoch.number)

    @position.setter
    def position(self, position: Position) -> None:
        self._rig.global_step = position.global_step


class GrownStructure:
    """The seeds in the model, as the piece of state whose loading changes which parameters and groups there are.

    `aim` says, before a restore, where it may go to: both ends of the way, since one that fails comes back.
    """

    def __init__(self, growth: Growth) -> None:
        self._growth = growth
        self._ends: list[_End] = []

    def aim(self, here: int, image: StateImage) -> None:
        """The next loads are to the image's structure, or back to the present one, at global step `here`."""
        values = cast("dict[str, Any]", json.loads(image.values))
        roles = {name: GroupRole(group["role"]) for name, group in values["parts"]["learning_rates"]["groups"].items()}
        wanted = [_WantedGroup.of(group, roles) for group in values["optimizer"]["groups"]]
        present = [_WantedGroup(plan.name, tuple(plan.parameters), plan.role) for plan in self._growth.manager.plan()]
        self._ends = [
            _End(
                cast("dict[str, JsonValue]", decode_plain(values["topology"])),
                image.position.global_step,
                tuple(wanted),
            ),
            _End(self.state_dict(), here, tuple(present)),
        ]

    def state_dict(self) -> dict[str, JsonValue]:
        """The structure."""
        return self._growth.topology.state_dict()

    def load_state_dict(self, state: Mapping[str, JsonValue]) -> None:
        """Graft and remove until the model has this structure, and regroup the optimizer accordingly.

        Raises:
            TopologyStateError: it is neither end of what was aimed at, or not the model's.
            SeedError: a blueprint is unknown or does not fit.
            OptimizationError: the optimizer cannot be rebuilt.
        """
        end = next((end for end in self._ends if end.structure == state), None)
        if end is None:
            raise TopologyStateError("nobody has aimed at this structure")
        self._growth.topology.load_state_dict(state, end.global_step)
        parameters = dict(self._growth.model.named_parameters())
        if missing := [n for group in end.groups for n in group.parameters if n not in parameters]:
            raise StateMismatchError([f"parameter/{name}: its seed is not part of the structure" for name in missing])
        groups = [
            GroupPlan(group.name, {name: parameters[name] for name in group.parameters}, group.role)
            for group in end.groups
        ]
        manager = self._growth.manager
        attempted_at_step = manager.attempted_at_step  # a piece of state of its own, which this is no attempt in
        manager.rebuild(groups, end.global_step, urgent=True)
        manager.attempted_at_step = attempted_at_step


def training_state(rig: Rig, structure: GrownStructure) -> TrainingState:
    """The state of a run, over the rig's live objects.

    Raises:
        StateUnsupportedError: when the model keeps state that is neither parameter nor buffer.
    """
    parts: dict[str, StatePart] = {
        "cursor": rig.cursor,
        "epoch": rig.epoch,
        "growth": rig.growth,
        "learning_rates": rig.growth.controller,
        "left_out": rig.left_out,
    }
    if rig.paths.scaler is not None:
        parts["scaler"] = rig.paths.scaler
    return TrainingState(LiveRig(rig), parts, topology=structure)


@dataclass(frozen=True, slots=True)
class _WantedGroup:
    name: str
    parameters: tuple[str, ...]
    role: GroupRole

    @classmethod
    def of(cls, group: Mapping[str, Any], roles: Mapping[str, GroupRole]) -> _WantedGroup:
        """From the image's own description."""
        name = str(group["options"]["name"])
        return cls(name, tuple(group["parameters"]), roles.get(name, GroupRole.HOST))


@dataclass(frozen=True, slots=True)
class _End:
    structure: Mapping[str, JsonValue]
    global_step: int
    groups: tuple[_WantedGroup, ...]
