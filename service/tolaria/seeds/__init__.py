"""Seeds: small networks grown in a host model's slots as Kasmina wishes. See `reconcile` first.

Imports torch and the contract; knows nothing of gradients' merging, optimizers, jobs, grpc or settings.
"""

from tolaria.seeds.alpha import Ramp
from tolaria.seeds.blueprints import bottleneck_adapter, depthwise_conv_adapter, lora, residual_mlp
from tolaria.seeds.ownership import Ownership, ownership
from tolaria.seeds.plan import Change, ChangeKind, Ground, Plan, Refusal, Standing, plan
from tolaria.seeds.reconcile import SeedTopology
from tolaria.seeds.reconciled import Reconciled
from tolaria.seeds.registry import Blueprint, Blueprints
from tolaria.seeds.slots import Layout, SeedSlot, SlotSpec, training_seeds

__all__ = [
    "Blueprint",
    "Blueprints",
    "Change",
    "ChangeKind",
    "Ground",
    "Layout",
    "Ownership",
    "Plan",
    "Ramp",
    "Reconciled",
    "Refusal",
    "SeedSlot",
    "SeedTopology",
    "SlotSpec",
    "Standing",
    "bottleneck_adapter",
    "depthwise_conv_adapter",
    "lora",
    "ownership",
    "plan",
    "residual_mlp",
    "training_seeds",
]
