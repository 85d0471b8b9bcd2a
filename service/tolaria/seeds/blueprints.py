"""The built-in blueprints: what a seed is made of. Each builds a branch for a slot, from a generator of its own.

A branch maps activations to activations of the same shape. It holds no dropout and no batch statistics, so that
freezing it, or another batch, never changes what it computes. Its last layer begins at zero: a fresh branch adds
nothing (He et al. 2016 motivate beginning near the identity; Zhang et al. 2019, "Fixup", and Bachlechner et al. 2021,
"ReZero", begin at it exactly). In the first training step only the last layer therefore has a gradient.

Must not know seeds, stages or the model around the slot.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tolaria.errors import BlueprintMisfitError
from tolaria.seeds.slots import SlotSpec

_MLP_EXPANSION = 2  # a seed is to stay small beside its host
_BOTTLENECK_REDUCTION = 4
_LORA_RANK_MAX = 8
_KERNEL = 3


# Forked, for torch draws the values that are then replaced from the global RNG.
@torch.random.fork_rng(devices=[])
def residual_mlp(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    """Norm, widen, GELU, narrow, at every position: the pre-norm MLP of transformers (Xiong et al. 2020).

    Raises:
        BlueprintMisfitError: fewer than two features, over which nothing can be normalised.
    """
    _need_features(slot, "residual_mlp", 2)
    hidden = _MLP_EXPANSION * slot.features
    norm = nn.GroupNorm(1, slot.features) if slot.layout == "image" else nn.LayerNorm(slot.features)
    inner = _begin_random(_pointwise(slot, slot.features, hidden), generator)
    return nn.Sequential(norm, inner, nn.GELU(), _begin_zero(_pointwise(slot, hidden, slot.features)))


@torch.random.fork_rng(devices=[])
def bottleneck_adapter(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    """Narrow, GELU, widen, at every position (Houlsby et al. 2019; for images 1 x 1, Rebuffi et al. 2018).

    Houlsby et al. begin near the identity; this begins at it.

    Raises:
        BlueprintMisfitError: fewer than two features, which leave no room for a bottleneck.
    """
    _need_features(slot, "bottleneck_adapter", 2)
    hidden = max(1, slot.features // _BOTTLENECK_REDUCTION)
    down = _begin_random(_pointwise(slot, slot.features, hidden), generator)
    return nn.Sequential(down, nn.GELU(), _begin_zero(_pointwise(slot, hidden, slot.features)))


@torch.random.fork_rng(devices=[])
def depthwise_conv_adapter(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    """A convolution of width 3 on each feature, GELU, then a mix of features (Howard et al. 2017; Chen et al. 2022).

    Along time it looks backwards only, so that a host that predicts the future cannot see it.

    Raises:
        BlueprintMisfitError: vectors, which have nowhere to convolve along.
    """
    if slot.layout == "vector":
        raise BlueprintMisfitError("depthwise_conv_adapter", slot.name, "vectors have no dimension to convolve along")
    if slot.layout == "image":
        along: nn.Module = _begin_random(
            nn.Conv2d(slot.features, slot.features, _KERNEL, padding=_KERNEL // 2, groups=slot.features),
            generator,
        )
    else:
        along = _CausalDepthwise(slot.features, generator)
    return nn.Sequential(along, nn.GELU(), _begin_zero(_pointwise(slot, slot.features, slot.features)))


@torch.random.fork_rng(devices=[])
def lora(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    """A linear map of low rank beside the layer before the slot: B A h, B zero at first (Hu et al. 2021, section 4.1).

    Their scaling alpha / r is 1 here: the seed's own alpha takes that place. For images the map is over channels.

    Raises:
        BlueprintMisfitError: fewer than two features, below which no rank is low.
    """
    _need_features(slot, "lora", 2)
    rank = max(1, min(_LORA_RANK_MAX, slot.features // 2))
    down = _begin_random(_pointwise(slot, slot.features, rank, bias=False), generator)
    return nn.Sequential(down, _begin_zero(_pointwise(slot, rank, slot.features, bias=False)))


class _CausalDepthwise(nn.Module):
    """Convolves (batch, time, features) along time, every feature for itself, with the past only."""

    def __init__(self, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.conv = _begin_random(nn.Conv1d(features, features, _KERNEL, groups=features), generator)

    def forward(self, h_BTC: Tensor) -> Tensor:  # noqa: N803 - shape suffix: batch, time, channel
        """As long as what came in."""
        past = functional.pad(h_BTC.transpose(1, 2), (_KERNEL - 1, 0))
        convolved: Tensor = self.conv(past)
        # Contiguous, for torch multiplies others in an order that depends on whether the weights are trained.
        return convolved.transpose(1, 2).contiguous()


_Layer = TypeVar("_Layer", bound=nn.Linear | nn.Conv1d | nn.Conv2d)


def _pointwise(slot: SlotSpec, before: int, after: int, *, bias: bool = True) -> nn.Linear | nn.Conv2d:
    """A linear map over features, the same at every position."""
    if slot.layout == "image":
        return nn.Conv2d(before, after, 1, bias=bias)
    return nn.Linear(before, after, bias=bias)


def _begin_random(layer: _Layer, generator: torch.Generator) -> _Layer:
    """Kaiming's uniform with torch's gain for linear layers and convolutions, from `generator`; bias zero."""
    with torch.no_grad():
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def _begin_zero(layer: _Layer) -> _Layer:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer


def _need_features(slot: SlotSpec, blueprint: str, least: int) -> None:
    if slot.features < least:
        raise BlueprintMisfitError(blueprint, slot.name, f"it needs at least {least} features, not {slot.features}")
