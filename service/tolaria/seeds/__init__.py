"""Seeds: small networks grafted into the slots of a host model, as Kasmina declares them."""

from typing import TYPE_CHECKING, Any

from tolaria.seeds.blueprints import Blueprint, Blueprints
from tolaria.seeds.slots import Layout, SeedSlot, SlotSpec, parameters_by_owner, training_seeds

if TYPE_CHECKING:
    from tolaria.seeds.topology import SeedTopology

__all__ = [
    "Blueprint",
    "Blueprints",
    "Layout",
    "SeedSlot",
    "SeedTopology",
    "SlotSpec",
    "parameters_by_owner",
    "training_seeds",
]


def __getattr__(name: str) -> Any:
    """Imports the topology, which needs the contract, at its first use: an exported model needs torch alone."""
    if name != "SeedTopology":
        raise AttributeError(name)
    from tolaria.seeds.topology import SeedTopology  # noqa: PLC0415 - see above

    return SeedTopology
