"""Seeds: small networks grafted into the slots of a host model, as Kasmina declares them."""

from tolaria.seeds.blueprints import (
    Blueprint,
    Blueprints,
    bottleneck_adapter,
    depthwise_conv_adapter,
    lora,
    residual_mlp,
)
from tolaria.seeds.ownership import NamedParameters, parameters_by_owner
from tolaria.seeds.slots import Layout, SeedSlot, SlotSpec, training_seeds
from tolaria.seeds.topology import Reconciliation, SeedTopology

__all__ = [
    "Blueprint",
    "Blueprints",
    "Layout",
    "NamedParameters",
    "Reconciliation",
    "SeedSlot",
    "SeedTopology",
    "SlotSpec",
    "bottleneck_adapter",
    "depthwise_conv_adapter",
    "lora",
    "parameters_by_owner",
    "residual_mlp",
    "training_seeds",
]
