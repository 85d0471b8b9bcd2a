"""`SeedSlot`, where seeds are grafted into a host model, the forward pass of a graft, and the owners of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from tolaria.errors import BlueprintError, OwnershipError, SlotError, first_line
from tolaria.values.training import HOST, eager_name

Layout: TypeAlias = Literal["vector", "sequence", "image"]
"""vector: (batch, features). sequence: (batch, time, features). image: (batch, features, height, width)."""

_CHANNEL_AT: dict[Layout, tuple[int, int]] = {"vector": (2, 1), "sequence": (3, 2), "image": (4, 1)}
"""Rank of the activations, and the dimension of their features."""

NamedParameters: TypeAlias = list[tuple[str, nn.Parameter]]
"""Parameters with their names in the model, in the model's order."""


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """The layout of a slot's activations and the number of their features, for blueprints."""

    name: str
    features: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class Activations:
    """What a slot was seen to receive: shape, dtype, device and strides, from which `like` makes an example."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]

    @classmethod
    def of(cls, h: Tensor) -> Activations:
        """Returns those of a tensor. With autocast, which chooses the dtype by operation, float32."""
        dtype = torch.float32 if torch.is_autocast_enabled(h.device.type) else h.dtype
        return cls(h.shape, dtype, h.device, h.stride())

    def like(self) -> Tensor:
        """Returns random activations of this form, from the global generator."""
        example = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return example.copy_(torch.randn(self.shape, device=self.device))


_RESERVED = frozenset(dir(nn.ModuleDict())) | {HOST}
_SEED_ID_LENGTH_MAX = 128


def seed_id_problem(seed_id: str) -> str | None:
    """Returns why an id cannot be part of the names of a seed's parameters; None if it can."""
    if not 0 < len(seed_id) <= _SEED_ID_LENGTH_MAX:
        return f"a seed id has 1 to {_SEED_ID_LENGTH_MAX} characters, not {len(seed_id)}"
    if "." in seed_id or seed_id in _RESERVED:
        return f"{seed_id!r} cannot be part of a parameter's name"
    return None


class SeedSlot(nn.Module):
    """A position behind a layer of a host where seeds are grafted: `SeedSlot("block1", features=64, layout="image")`.

    Without seeds it returns its input, the same tensor. Seeds form a chain: first those that are part of the host,
    then at most one further seed, whose input is their output.

    Args:
        name: the name that Kasmina uses; unique in the model.
        features: channels of the activations.
        layout: see `Layout`.

    Attributes:
        seen: the activations of the last forward pass inside `observed`; None before the first one.

    Raises:
        SlotError: an empty name, no features, or an unknown layout.
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
        self.seen: Activations | None = None

    def forward(self, h: Tensor) -> Tensor:
        """Returns the activations with the output of the seeds added. Does not synchronise.

        Args:
            h: activations in the declared layout, of any floating-point dtype.

        Raises:
            SlotError: the activations have another rank or another number of features.
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
        """Returns the grafts by seed id, in the order in which they run."""
        return {seed_id: cast("Graft", graft) for seed_id, graft in self.seeds.items()}

    def arrange(self, grafts: dict[str, Graft]) -> None:
        """Replaces all grafts by these, in this order."""
        self.seeds.clear()
        self.seeds.update(grafts)


class Graft(nn.Module):
    """A seed in its slot: its branch s, and how the branch's output is added to the activations h.

    Alpha 0 and not trainable: returns h itself; the branch does not run. Alpha 0 and trainable: the value is h, bit
    for bit, and the branch gets gradients (`_AddZero`). Alpha above 0: h + alpha s(h), with gradients everywhere.

    So a seed whose blending starts at alpha 0 trains as before: the host's gradient is its limit for alpha to 0 (that
    of h alone), the branch's is not multiplied by zero, and an infinite branch output does not become NaN.

    Args:
        seed_id: the seed's id, for error messages.
        branch: maps activations to activations of the same shape; on the model's device and in its dtype.
        slot: the spec of its slot.
        isolated: whether gradients stop at the branch while alpha is 0, so that they do not reach the host.
    """

    def __init__(self, seed_id: str, branch: nn.Module, slot: SlotSpec, *, isolated: bool) -> None:
        super().__init__()
        self.branch = branch
        self.seed_id = seed_id
        self._where = f"seed {seed_id!r} in slot {slot.name!r}"
        self._layout: Layout = slot.layout
        self._isolated = isolated
        self._frozen = {name for name, p in branch.named_parameters() if not p.requires_grad}
        # A compiler guards a number by its value, and would compile anew for every step of a ramp; a tensor is an input
        # of the graph. Not a buffer: alpha is a function of the step, and not part of the saved tensors.
        self._factor = torch.zeros((), dtype=torch.float64)
        self._adds = False
        self.contains, self.failure = False, ""
        """Whether a forward pass of the branch that raises is left out and noted as `failure`: other ranks go on."""
        self.set_trainable(trainable=False)

    @property
    def alpha(self) -> float:
        """The factor of the branch's output."""
        return float(self._factor)

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._factor.fill_(alpha)
        self._adds = alpha != 0.0

    def set_trainable(self, *, trainable: bool) -> None:
        """Unfreezes the parameters that the blueprint made trainable, or freezes them and drops their gradients."""
        self.trainable = trainable
        for name, parameter in self.branch.named_parameters():
            if name in self._frozen:
                continue
            parameter.requires_grad_(trainable)
            if not trainable:
                parameter.grad = None

    def failure_on(self, seen: Activations) -> str | None:
        """Runs the branch forward and backward on random activations; returns what it raised, None if it did not."""
        devices = [] if seen.device.type == "cpu" else [seen.device]
        with torch.random.fork_rng(devices, device_type=seen.device.type if devices else "cuda"), torch.enable_grad():
            try:
                h = seen.like().requires_grad_()
                wanted = [h, *(p for p in self.branch.parameters() if p.requires_grad)]
                torch.autograd.grad(self._branch_at(h).sum(), wanted, allow_unused=True)
            except Exception as error:  # noqa: BLE001 - a blueprint's code may raise anything
                return f"{type(error).__name__}: {error}"
        return None

    def forward(self, h: Tensor) -> Tensor:
        """Returns the activations with the seed's output added. Does not synchronise.

        Raises:
            BlueprintError: the branch returned another shape.
        """
        if not self.contains:
            return self._added(h)
        try:
            return self._added(h)
        except Exception as error:  # noqa: BLE001 - a blueprint's code may raise anything
            self.failure = f"{type(error).__name__}: {first_line(error)}"
            return h

    def _added(self, h: Tensor) -> Tensor:
        if not self._adds:
            if not (self.trainable and torch.is_grad_enabled()):
                return h
            s = self._branch_at(h.detach() if self._isolated else h)
            out: Tensor = _AddZero.apply(h, s)  # type: ignore[no-untyped-call] # torch leaves it untyped
            return out
        return h + self._branch_at(h) * self._factor

    def _branch_at(self, h: Tensor) -> Tensor:
        # torch multiplies a batch of non-contiguous matrices in an order that depends on whether the weights require
        # gradients, so freezing them would change the last bits of the output. On a CPU, the backward pass of GroupNorm
        # over channels_last activations that need no gradient crashes the process.
        ordered = self._layout == "sequence" or (self._layout == "image" and h.device.type == "cpu")
        s: Tensor = self.branch(h.contiguous() if ordered else h)
        if s.shape != h.shape:
            raise BlueprintError(f"{self._where}: its branch made {tuple(s.shape)} of {tuple(h.shape)}")
        return s.to(h.dtype)  # autocast may have changed it; the host's dtype must not change


class _AddZero(torch.autograd.Function):
    """h as a value, h + s for gradients.

    The usual h + (s - s.detach()) has the same gradients but not the same value: an infinite or NaN s gives NaN, a
    -0.0 in h becomes 0.0, and a compiler that reorders the sum rounds h. This returns a copy of h, so the value is
    bit-equal. A copy and not h itself, since a host that continues in place (`ReLU(inplace=True)`) would overwrite
    what the branch saved for its backward pass.
    """

    @staticmethod
    def forward(h: Tensor, s: Tensor) -> Tensor:
        """Returns a copy of h."""
        del s
        return h.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Saves nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradient of the output for both inputs."""
        del ctx
        (gradient,) = gradients
        return gradient, gradient


@contextmanager
def observed(model: nn.Module) -> Iterator[None]:
    """Records in every slot what it receives during the forward passes inside."""

    def record(slot: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        cast("SeedSlot", slot).seen = Activations.of(arguments[0])

    handles = [slot.register_forward_pre_hook(record) for _, slot in slots_of(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def slots_of(model: nn.Module) -> dict[str, tuple[str, SeedSlot]]:
    """Returns the module path of each slot (see `eager_name`) and the slot, by name and in the model's order.

    Raises:
        SlotError: two slots have the same name.
    """
    found: dict[str, tuple[str, SeedSlot]] = {}
    for prefixed, module in model.named_modules():
        if not isinstance(module, SeedSlot):
            continue
        path, name = eager_name(prefixed), module.spec.name
        if name in found:
            raise SlotError(f"two slots are called {name!r}: {found[name][0]!r} and {path!r}")
        found[name] = (path, module)
    return found


def seed_that_raised(error: BaseException) -> str | None:
    """Returns the id of the seed in whose forward pass the error was raised; None for one raised elsewhere."""
    frames = (frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code is Graft.forward.__code__)
    return next((cast("Graft", frame.f_locals["self"]).seed_id for frame in frames), None)


def training_seeds(model: nn.Module) -> tuple[str, ...]:
    """Returns the ids of the seeds that are trained, for a job that has a loss for each of them."""
    slots = (slot for _, slot in slots_of(model).values())
    return tuple(seed_id for slot in slots for seed_id, graft in slot.grafts().items() if graft.trainable)


def parameters_by_owner(model: nn.Module) -> dict[str, NamedParameters]:
    """Returns the parameters of each owner, named as by `eager_name`: `HOST` first, then the model's seeds in order.

    A parameter that is tied within one owner appears once, under its first name.

    Raises:
        OwnershipError: a parameter belongs to two owners.
        SlotError: two slots have the same name.
    """
    prefixes = {
        f"{seed_prefix(path, seed_id)}.": seed_id for path, slot in slots_of(model).values() for seed_id in slot.seeds
    }
    owned: dict[str, NamedParameters] = {HOST: [], **{seed_id: [] for seed_id in prefixes.values()}}
    first_seen: dict[int, tuple[str, str]] = {}
    for prefixed, parameter in model.named_parameters(remove_duplicate=False):
        name = eager_name(prefixed)
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
