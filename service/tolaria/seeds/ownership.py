"""The owner of every parameter of a model: the host or a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import nn

from tolaria.errors import OwnershipError
from tolaria.seeds.slots import slots_of
from tolaria.values.training import HOST

NamedParameters: TypeAlias = list[tuple[str, nn.Parameter]]
"""Parameters with their names in the model, in the model's order."""


def parameters_by_owner(model: nn.Module) -> dict[str, NamedParameters]:
    """Returns the parameters of each owner: `HOST` first, then the seeds in the model's order.

    A parameter that is tied within one owner appears once, under its first name.

    Raises:
        OwnershipError: a parameter belongs to two owners.
        SlotError: two slots have the same name.
    """
    prefixes = _seed_prefixes(model)
    owned: dict[str, NamedParameters] = {HOST: [], **{seed_id: [] for seed_id in prefixes.values()}}
    first_seen: dict[int, tuple[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((seed_id for prefix, seed_id in prefixes.items() if name.startswith(prefix)), HOST)
        first_owner, first_name = first_seen.setdefault(id(parameter), (owner, name))
        if first_owner != owner:
            raise OwnershipError(
                f"one parameter is owned twice: as {first_name!r} by {first_owner!r} and as {name!r} by {owner!r}"
            )
        if first_name == name:
            owned[owner].append((name, parameter))
    return owned


def seed_prefix(slot_path: str, seed_id: str) -> str:
    """Returns the module path of a seed in the slot at `slot_path`."""
    return ".".join(part for part in (slot_path, "seeds", seed_id) if part)


def _seed_prefixes(model: nn.Module) -> Mapping[str, str]:
    """Returns the id of each seed by the prefix (with the dot) of its parameters' names."""
    return {
        f"{seed_prefix(path, seed_id)}.": seed_id for path, slot in slots_of(model).values() for seed_id in slot.seeds
    }
