from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import Tensor, nn

from tolaria.errors import BlueprintError, BlueprintMisfitError, UnknownBlueprintError
from tolaria.seeds import Blueprints, SlotSpec

SPEC = SlotSpec("here", 4, "vector")


def _failing(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    raise RuntimeError("out of luck")


def _failing_forward(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    return nn.Linear(slot.features + 1, slot.features)


def _narrowing(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    return nn.Linear(slot.features, 1)


def _dropping(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    return nn.Sequential(nn.Linear(slot.features, slot.features), nn.Dropout(0.5))


def _counting(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    return nn.BatchNorm1d(slot.features)


def _no_module(slot: SlotSpec, generator: torch.Generator) -> int:
    return 3


def _careless(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    return nn.Linear(slot.features, slot.features)


class Pair(nn.Module):
    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h, h


class Scaling(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * 2.0 if self.training else h


def _scaling(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    return Scaling()


class Transposing(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.mix = nn.Linear(features, features)

    def forward(self, h: Tensor) -> Tensor:
        there = h.view(1, 2, -1).expand(64, 2, -1).transpose(1, 2).contiguous().transpose(1, 2)
        out: Tensor = self.mix(there)[0]
        return out


def _transposing(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    return Transposing(slot.features)


def _pairing(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
    return Pair()


NOT_CALLABLE = 3


def _registry(monkeypatch: pytest.MonkeyPatch, attribute: str) -> Blueprints:
    monkeypatch.setitem(sys.modules, "of_this_test", sys.modules[__name__])
    return Blueprints([EntryPoint("b", f"of_this_test:{attribute}", "tolaria.blueprints")])


@pytest.mark.parametrize(
    ("attribute", "error", "why"),
    [
        ("_failing", BlueprintError, "in slot 'here' raised RuntimeError: out of luck"),
        ("_failing_forward", BlueprintError, "in slot 'here' raised RuntimeError"),
        ("_narrowing", BlueprintMisfitError, r"makes shape \(2, 1\) of activations of shape \(2, 4\)"),
        ("_dropping", BlueprintMisfitError, "draws random numbers"),
        ("_counting", BlueprintMisfitError, "changes its buffers"),
        ("_scaling", BlueprintMisfitError, "differs between training and evaluation"),
        ("_transposing", BlueprintMisfitError, "differs once it is frozen"),
        ("_no_module", BlueprintMisfitError, "built a int, not a module"),
        ("_pairing", BlueprintMisfitError, "makes a tuple"),
        ("NOT_CALLABLE", BlueprintError, "is a int, which cannot be called"),
        ("missing", BlueprintError, "cannot be imported: AttributeError"),
    ],
)
def test_broken_blueprints(monkeypatch: pytest.MonkeyPatch, attribute: str, error: type[Exception], why: str) -> None:
    """Whatever a foreign blueprint does wrong becomes an error that names it, and the global RNG stays as it was."""
    before = torch.get_rng_state()
    with pytest.raises(error, match=why):
        _registry(monkeypatch, attribute).try_out("b", SPEC)
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_name(blueprints: Blueprints) -> None:
    """An unknown blueprint is told with those that are known."""
    with pytest.raises(UnknownBlueprintError, match="'moss' is unknown; known are absent, bottleneck_adapter"):
        blueprints.grow("moss", SPEC, 0)


def test_blueprint_that_ignores_its_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even values drawn from the global RNG repeat, and do not move it."""
    found = _registry(monkeypatch, "_careless")
    before = torch.get_rng_state()
    first = found.grow("b", SPEC, 1).state_dict()
    torch.manual_seed(99)
    again, other = (found.grow("b", SPEC, seed).state_dict() for seed in (1, 2))
    torch.set_rng_state(before)
    assert torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["weight"], other["weight"])


def test_installed_reads_the_environment() -> None:
    """What packages register under tolaria.blueprints is found by name."""
    assert isinstance(Blueprints.installed().names, frozenset)
