"""Whose every parameter of a model is: the host's or a seed's. Reads the model; changes nothing.

Must not know optimizers or gradients, which ask here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from tolaria.errors import OwnershipError
from tolaria.seeds.slots import slots_of
from tolaria.values.training import HOST

NamedParameters: TypeAlias = list[tuple[str, nn.Parameter]]
"""Parameters with their names in the model, in the model's order."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """Parameters by owner: `HOST` first, then seeds in the order of the model.

    A parameter tied within one owner appears once, under its first name.
    """

    by_owner: Mapping[str, NamedParameters]

    def owner_of(self, name: str) -> str:
        """The owner of the parameter of that name.

        Raises:
            OwnershipError: no parameter has it.
        """
        for owner, parameters in self.by_owner.items():
            if any(name == known for known, _ in parameters):
                return owner
        raise OwnershipError(f"the model has no parameter {name!r}")


def ownership(model: nn.Module) -> Ownership:
    """Find the owner of every parameter.

    Raises:
        OwnershipError: a parameter belongs to two owners.
        SlotError: two slots of one name.
    """
    prefixes = seed_prefixes(model)
    owned: dict[str, NamedParameters] = {HOST: [], **{seed_id: [] for seed_id in prefixes.values()}}
    taken: dict[int, tuple[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = _owner(name, prefixes)
        if id(parameter) not in taken:
            taken[id(parameter)] = (owner, name)
            owned[owner].append((name, parameter))
        elif taken[id(parameter)][0] != owner:
            first_owner, first_name = taken[id(parameter)]
            raise OwnershipError(
                f"one parameter is owned twice: as {first_name!r} by {first_owner!r} and as {name!r} by {owner!r}"
            )
    return Ownership(owned)


def seed_prefixes(model: nn.Module) -> dict[str, str]:
    """Name prefix (with the dot) of the parameters of each seed -> its id."""
    return {
        ".".join(part for part in (path, "seeds", seed_id) if part) + ".": seed_id
        for path, slot in slots_of(model).values()
        for seed_id in slot.seeds
    }


def _owner(name: str, prefixes: Mapping[str, str]) -> str:
    for prefix, seed_id in prefixes.items():
        if name.startswith(prefix):
            return seed_id
    return HOST
