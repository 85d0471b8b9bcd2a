"""The registry that finds blueprints by entry points, builds and checks their branches, and the built-in blueprints.

A branch maps activations to activations of the same shape, without random numbers or batch statistics. The last layer
of the built-in ones starts at zero, so that a new branch adds nothing (Zhang et al. 2019, "Fixup"; Bachlechner et al.
2021, "ReZero"); in the first step only that layer has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tolaria.errors import BlueprintError, BlueprintMisfitError, SeedError, UnknownBlueprintError
from tolaria.seeds.slots import Layout, SlotSpec

ENTRY_POINTS = "tolaria.blueprints"

Blueprint: TypeAlias = Callable[[SlotSpec, torch.Generator], nn.Module]
"""Builds a branch on the CPU in float32, with values drawn from the generator.

Raises BlueprintMisfitError if it cannot build one for the slot."""

_EXAMPLE: dict[Layout, Callable[[int], Sequence[int]]] = {
    "vector": lambda features: (2, features),
    "sequence": lambda features: (2, 5, features),
    "image": lambda features: (2, features, 5, 5),
}
_MLP_EXPANSION = 2  # a seed is small beside its host
_BOTTLENECK_REDUCTION = 4
_LORA_RANK_MAX = 8
_KERNEL = 3


class Blueprints:
    """The known blueprints by name; each is imported on first use."""

    def __init__(self, found: Iterable[EntryPoint]) -> None:
        self._entries = {entry.name: entry for entry in found}

    @classmethod
    def installed(cls) -> Blueprints:
        """Returns all blueprints that are registered under `tolaria.blueprints` in this environment."""
        return cls(entry_points(group=ENTRY_POINTS))

    @property
    def names(self) -> frozenset[str]:
        """The known names."""
        return frozenset(self._entries)

    def build(self, name: str, slot: SlotSpec, init_seed: int) -> nn.Module:
        """Returns a branch for the slot, on the CPU, in float32, trainable as its blueprint made it.

        The same name, slot and seed give the same values. For blueprints that ignore their generator, the global RNG
        is seeded from `init_seed` during the call, and restored afterwards.

        Raises:
            UnknownBlueprintError: there is no such name.
            BlueprintError: the blueprint cannot be imported or raised an error.
            BlueprintMisfitError: it does not fit the slot, or did not return a module.
        """
        blueprint = self._load(name)
        with _guarded(name, slot, init_seed):
            branch: object = blueprint(slot, torch.Generator().manual_seed(init_seed))
        if not isinstance(branch, nn.Module):
            raise BlueprintMisfitError(name, slot.name, f"it built a {type(branch).__name__}, not a module")
        return branch

    def check(self, name: str, slot: SlotSpec) -> None:
        """Builds a branch, runs it with random parameters, and discards it.

        Raises:
            SeedError: as `build`, or the branch breaks a rule.
        """
        branch = self.build(name, slot, init_seed=0)
        with _guarded(name, slot, init_seed=0):
            problem = _branch_problem(branch, slot)
        if problem is not None:
            raise BlueprintMisfitError(name, slot.name, problem)

    def _load(self, name: str) -> Blueprint:
        if name not in self._entries:
            known = ", ".join(sorted(self._entries)) or "none"
            raise UnknownBlueprintError(f"blueprint {name!r} is unknown; known are {known}")
        try:
            found: object = self._entries[name].load()
        except Exception as error:
            raise BlueprintError(f"blueprint {name!r} cannot be imported: {type(error).__name__}: {error}") from error
        if not callable(found):
            raise BlueprintError(f"blueprint {name!r} is a {type(found).__name__}, which cannot be called")
        return found


@contextmanager
def _guarded(name: str, slot: SlotSpec, init_seed: int) -> Iterator[None]:
    """Isolates the global RNG and converts errors of a blueprint's code into `BlueprintError`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(init_seed)
        try:
            yield
        except SeedError:
            raise
        except Exception as error:
            raise BlueprintError(
                f"blueprint {name!r} in slot {slot.name!r} raised {type(error).__name__}: {error}"
            ) from error


def _branch_problem(branch: nn.Module, slot: SlotSpec) -> str | None:
    """Returns which rule a branch breaks, None if none; overwrites its parameters."""
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(*_EXAMPLE[slot.layout](slot.features), generator=generator)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        buffers = [buffer.clone() for buffer in branch.buffers()]
        rng = torch.get_rng_state()
        made: object = branch.train()(example)
        if not isinstance(made, Tensor) or made.shape != example.shape:
            shape = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
            return f"it makes {shape} of activations of shape {tuple(example.shape)}"
        if not torch.equal(torch.get_rng_state(), rng):
            return "its forward pass draws random numbers (dropout?), which would change the host's"
        if not all(torch.equal(now, then) for now, then in zip(branch.buffers(), buffers, strict=True)):
            return "its forward pass changes its buffers (batch statistics?)"
        if not torch.equal(made, branch.eval()(example)):
            return "its output differs between training and evaluation"
        if not torch.equal(made, branch.requires_grad_(requires_grad=False).train()(example)):
            return "its output differs once it is frozen (a product of a tensor that is not contiguous?)"
    return None


# fork_rng: torch draws the initial values, which are then replaced, from the global RNG.
@torch.random.fork_rng(devices=[])
def residual_mlp(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    """Norm, widen, GELU, narrow at every position: the pre-norm MLP of transformers (Xiong et al. 2020)."""
    _require_two_features(slot, "residual_mlp")
    hidden = _MLP_EXPANSION * slot.features
    norm = nn.GroupNorm(1, slot.features) if slot.layout == "image" else nn.LayerNorm(slot.features)
    inner = _init_random(_pointwise(slot, slot.features, hidden), generator)
    return nn.Sequential(norm, inner, nn.GELU(), _init_zero(_pointwise(slot, hidden, slot.features)))


@torch.random.fork_rng(devices=[])
def bottleneck_adapter(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    """Narrow, GELU, widen at every position (Houlsby et al. 2019; for images 1 x 1, Rebuffi et al. 2018).

    Houlsby et al. start near the identity; this starts at it.
    """
    _require_two_features(slot, "bottleneck_adapter")
    hidden = max(1, slot.features // _BOTTLENECK_REDUCTION)
    down = _init_random(_pointwise(slot, slot.features, hidden), generator)
    return nn.Sequential(down, nn.GELU(), _init_zero(_pointwise(slot, hidden, slot.features)))


@torch.random.fork_rng(devices=[])
def depthwise_conv_adapter(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    """A convolution of width 3 on each feature, GELU, then a mix of features (Howard et al. 2017; Chen et al. 2022).

    Along time it is causal. Vectors have no dimension to convolve along, and are refused.
    """
    if slot.layout == "vector":
        raise BlueprintMisfitError("depthwise_conv_adapter", slot.name, "vectors have no dimension to convolve along")
    if slot.layout == "image":
        convolution: nn.Module = _init_random(
            nn.Conv2d(slot.features, slot.features, _KERNEL, padding=_KERNEL // 2, groups=slot.features),
            generator,
        )
    else:
        convolution = _CausalDepthwise(slot.features, generator)
    return nn.Sequential(convolution, nn.GELU(), _init_zero(_pointwise(slot, slot.features, slot.features)))


@torch.random.fork_rng(devices=[])
def lora(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    """A low-rank linear map beside the layer before the slot: B A h, B zero at first (Hu et al. 2021, section 4.1).

    Their scaling alpha / r is 1 here: the seed's alpha replaces it. For images the map is over channels.
    """
    _require_two_features(slot, "lora")
    rank = max(1, min(_LORA_RANK_MAX, slot.features // 2))
    down = _init_random(_pointwise(slot, slot.features, rank, bias=False), generator)
    return nn.Sequential(down, _init_zero(_pointwise(slot, rank, slot.features, bias=False)))


class _CausalDepthwise(nn.Module):
    """A causal convolution of (batch, time, features) along time, each feature separately."""

    def __init__(self, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.conv = _init_random(nn.Conv1d(features, features, _KERNEL, groups=features), generator)

    def forward(self, h_BTC: Tensor) -> Tensor:  # noqa: N803 - shape suffix: batch, time, channel
        """Returns activations of the same shape."""
        past = functional.pad(h_BTC.transpose(1, 2), (_KERNEL - 1, 0))
        convolved: Tensor = self.conv(past)
        # torch multiplies non-contiguous tensors in an order that depends on whether the weights require gradients.
        return convolved.transpose(1, 2).contiguous()


_Layer = TypeVar("_Layer", bound=nn.Linear | nn.Conv1d | nn.Conv2d)


def _pointwise(slot: SlotSpec, before: int, after: int, *, bias: bool = True) -> nn.Linear | nn.Conv2d:
    """Returns a linear map over features, the same at every position."""
    if slot.layout == "image":
        return nn.Conv2d(before, after, 1, bias=bias)
    return nn.Linear(before, after, bias=bias)


def _init_random(layer: _Layer, generator: torch.Generator) -> _Layer:
    """Initialises the weight by Kaiming's uniform with torch's gain for linear layers, and the bias to zero."""
    with torch.no_grad():
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def _init_zero(layer: _Layer) -> _Layer:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer


def _require_two_features(slot: SlotSpec, blueprint: str) -> None:
    if slot.features < 2:
        raise BlueprintMisfitError(blueprint, slot.name, f"it needs at least 2 features, not {slot.features}")
