"""Seeds: small networks grafted into the slots of a host model, as Kasmina declares them."""

from tolaria.seeds.blueprints import Blueprint, Blueprints
from tolaria.seeds.slots import Layout, SeedSlot, SlotSpec, parameters_by_owner, training_seeds
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
