"""Slots: the places in a host model where seeds grow, and how a seed's branch joins what flows through.

Owns the forward pass of seeds. Must not know stages, wishes or who trains what: it is told what to add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from tolaria.errors import BlueprintError, SlotError

Layout: TypeAlias = Literal["vector", "sequence", "image"]
"""vector: (batch, features). sequence: (batch, time, features). image: (batch, features, height, width)."""

_CHANNEL_AT: dict[Layout, tuple[int, int]] = {"vector": (2, 1), "sequence": (3, 2), "image": (4, 1)}
"""Rank of the activations, and which of its dimensions counts features."""


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """What a blueprint must know to build a branch that fits: how activations are laid out, and their features."""

    name: str
    features: int
    layout: Layout


_RESERVED = frozenset(dir(nn.ModuleDict())) | {"host"}
_SEED_ID_LENGTH_MAX = 128


def seed_id_problem(seed_id: str) -> str | None:
    """Why an id cannot be part of the names of a seed's parameters; None when it can."""
    if not 0 < len(seed_id) <= _SEED_ID_LENGTH_MAX:
        return f"a seed id has 1 to {_SEED_ID_LENGTH_MAX} characters, not {len(seed_id)}"
    if "." in seed_id or seed_id in _RESERVED:
        return f"{seed_id!r} cannot be part of a parameter's name"
    return None


class SeedSlot(nn.Module):
    """A place behind some layer of a host where seeds grow: `SeedSlot("block1", features=64, layout="image")`.

    Without seeds it returns what it is given, the very same tensor. Seeds stand in a chain: those that are part of the
    host first, then at most one that lives, which so sees what its forerunners made of the activations.

    Args:
        name: what Kasmina calls it; unique in the model.
        features: channels of the activations.
        layout: see `Layout`.

    Raises:
        SlotError: an empty name, no features, an unknown layout.
    """

    def __init__(self, name: str, *, features: int, layout: Layout) -> None:
        super().__init__()
        if not name or features < 1 or layout not in get_args(Layout):
            raise SlotError(
                f"slot {name!r} with {features} features and layout {layout!r}: a slot has a name, at least one "
                f"feature and a layout of {', '.join(get_args(Layout))}"
            )
        self.spec = SlotSpec(name, features, layout)
        self.seeds = nn.ModuleDict()

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the spec's layout, any floating dtype, with what the seeds add. Does not synchronise.

        Raises:
            SlotError: activations that are not what the slot was declared for.
        """
        rank, channel = _CHANNEL_AT[self.spec.layout]
        if h.dim() != rank or h.size(channel) != self.spec.features:
            raise SlotError(
                f"slot {self.spec.name!r} is declared for {self.spec.layout} activations with {self.spec.features} "
                f"features, got shape {tuple(h.shape)}"
            )
        for graft in self.seeds.values():
            h = graft(h)
        return h

    def grafts(self) -> dict[str, Graft]:
        """Seeds by id, in the order in which activations pass them."""
        return {seed_id: cast("Graft", graft) for seed_id, graft in self.seeds.items()}

    def arrange(self, grafts: dict[str, Graft]) -> None:
        """Hold exactly these, in this order."""
        self.seeds.clear()
        self.seeds.update(grafts)


class Graft(nn.Module):
    """A seed in its slot: the branch s, and how its output joins the activations h.

    Silent (alpha 0, not learning): h itself; the branch is not run. Learning at alpha 0: the forward value is h, bit
    by bit, and the branch learns on its own (`_AddSilently`). At alpha above 0: h + alpha s(h), gradients everywhere.

    A blend that stands at alpha 0 so trains as before it: the host's gradient is the limit for alpha to 0 (that of h
    alone), the branch's is not multiplied with zero, and the infinities of a sick branch are not turned into NaN.

    Args:
        seed_id: for messages.
        branch: maps activations to activations of the same shape; moved to the right device and dtype.
        slot: where it stands.
        isolated: whether the gradient of a branch at alpha 0 ends at the branch, so that it cannot move the host.
    """

    def __init__(self, seed_id: str, branch: nn.Module, slot: SlotSpec, *, isolated: bool) -> None:
        super().__init__()
        self.branch = branch
        self.alpha = 0.0
        self._where = f"seed {seed_id!r} in slot {slot.name!r}"
        self._contiguous = slot.layout == "sequence"
        self._isolated = isolated
        self._learning = False
        self._trainable = [p for p in branch.parameters() if p.requires_grad]
        self.learn(learning=False)

    def learn(self, *, learning: bool) -> None:
        """Unfreeze the parameters that the blueprint made trainable, or freeze them and drop their gradients."""
        self._learning = learning
        for parameter in self._trainable:
            parameter.requires_grad_(learning)
            if not learning:
                parameter.grad = None

    @property
    def learning(self) -> bool:
        """Whether its parameters are trained now."""
        return self._learning

    def forward(self, h: Tensor) -> Tensor:
        """The activations with the seed's share. Does not synchronise.

        Raises:
            BlueprintError: the branch changed the shape of its activations.
        """
        if self.alpha == 0.0:
            if not (self._learning and torch.is_grad_enabled()):
                return h
            s = self._branch_at(h.detach() if self._isolated else h)
            out: Tensor = _AddSilently.apply(h, s)  # type: ignore[no-untyped-call] # torch leaves it untyped
            return out
        return torch.add(h, self._branch_at(h), alpha=self.alpha)

    def _branch_at(self, h: Tensor) -> Tensor:
        # torch multiplies a batch of matrices that is not contiguous in an order that depends on whether the weights
        # are trained: freezing them would change the output in its last bits.
        s: Tensor = self.branch(h.contiguous() if self._contiguous else h)
        if s.shape != h.shape:
            raise BlueprintError(f"{self._where}: its branch made {tuple(s.shape)} of {tuple(h.shape)}")
        return s.to(h.dtype)  # autocast may have given the branch another one; the host's must not change


class _AddSilently(torch.autograd.Function):
    """h + 0 as a value, h + s as far as gradients are concerned.

    The usual h + (s - s.detach()) gives the same gradients but not the same value: an infinite or NaN s makes NaN of
    it, a -0.0 in h turns into 0.0, and a compiler that reorders the sum rounds h. Here h is copied, so that the value
    is bit-equal whatever the branch computes. A copy rather than h itself, for a host that goes on in place
    (`ReLU(inplace=True)`) would overwrite what the branch keeps for its backward pass.
    """

    generate_vmap_rule = True  # rows of several sources may be taken as one batched vector-Jacobian product

    @staticmethod
    def forward(h: Tensor, s: Tensor) -> Tensor:
        """A copy of h."""
        del s
        return h.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The output's gradient, to both."""
        del ctx
        (gradient,) = gradients
        return gradient, gradient


def slots_of(model: nn.Module) -> dict[str, tuple[str, SeedSlot]]:
    """By name, in the model's order: the module path of each slot, and the slot.

    Raises:
        SlotError: two slots of one name.
    """
    found: dict[str, tuple[str, SeedSlot]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, SeedSlot):
            continue
        name = module.spec.name
        if name in found:
            raise SlotError(f"two slots are called {name!r}: {found[name][0]!r} and {path!r}")
        found[name] = (path, module)
    return found


def training_seeds(model: nn.Module) -> tuple[str, ...]:
    """Ids of the seeds that are trained now, for a job that has a loss for each of them."""
    slots = (slot for _, slot in slots_of(model).values())
    return tuple(seed_id for slot in slots for seed_id, graft in slot.grafts().items() if graft.learning)
