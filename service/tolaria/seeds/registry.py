"""Finds blueprints by entry points and makes branches of them. The seam to other people's code.

Owns what a branch must hold to: the shape, no random numbers, no statistics of batches. Must not know seeds' stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tolaria.errors import BlueprintError, BlueprintMisfitError, SeedError, UnknownBlueprintError
from tolaria.seeds.slots import Layout, SlotSpec

ENTRY_POINTS = "tolaria.blueprints"

Blueprint: TypeAlias = Callable[[SlotSpec, torch.Generator], nn.Module]
"""Builds a branch, on the CPU in float32, with values from the generator. Raises `BlueprintMisfitError` where it
cannot."""

_EXAMPLE: dict[Layout, Callable[[int], Sequence[int]]] = {
    "vector": lambda features: (2, features),
    "sequence": lambda features: (2, 5, features),
    "image": lambda features: (2, features, 5, 5),
}


class Blueprints:
    """Blueprints by name; imported when first used."""

    def __init__(self, found: Iterable[EntryPoint]) -> None:
        self._entries = {entry.name: entry for entry in found}

    @classmethod
    def installed(cls) -> Blueprints:
        """All that is registered under `tolaria.blueprints` in this environment."""
        return cls(entry_points(group=ENTRY_POINTS))

    @property
    def names(self) -> frozenset[str]:
        """The known names."""
        return frozenset(self._entries)

    def grow(self, name: str, slot: SlotSpec, init_seed: int) -> nn.Module:
        """A branch for the slot, on the CPU, in float32, trainable as its blueprint made it.

        The same name, slot and seed give the same values. The global RNG is as before afterwards, whatever the
        blueprint does; it is seeded from `init_seed` meanwhile, for those that ignore their generator.

        Raises:
            UnknownBlueprintError: no such name.
            BlueprintError: it cannot be imported or built.
            BlueprintMisfitError: it does not fit the slot, or built something else than a module.
        """
        build = self._load(name)
        with _foreign_code(name, slot, init_seed):
            branch: object = build(slot, torch.Generator().manual_seed(init_seed))
        if not isinstance(branch, nn.Module):
            raise BlueprintMisfitError(name, slot.name, f"it built a {type(branch).__name__}, not a module")
        return branch

    def try_out(self, name: str, slot: SlotSpec) -> None:
        """Grow a branch to throw away, with random values everywhere, and see that it holds to what a branch must.

        Raises:
            SeedError: as `grow`, or what the trial shows to be wrong.
        """
        branch = self.grow(name, slot, init_seed=0)
        with _foreign_code(name, slot, init_seed=0):
            problem = _problem(branch, slot)
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
def _foreign_code(name: str, slot: SlotSpec, init_seed: int) -> Iterator[None]:
    """Keeps the global RNG of what runs inside apart, and gives its errors the blueprint's name."""
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


def _problem(branch: nn.Module, slot: SlotSpec) -> str | None:
    """What a trial shows to be wrong with a branch, whose values it overwrites; None when it will do."""
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
