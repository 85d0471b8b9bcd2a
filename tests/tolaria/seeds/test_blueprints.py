from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import Tensor, nn

from tolaria.errors import BlueprintError, BlueprintMisfitError, UnknownBlueprintError
from tolaria.seeds import Blueprint, Blueprints, Layout, SlotSpec
from tolaria.seeds.blueprints import bottleneck_adapter, depthwise_conv_adapter, lora, residual_mlp

SPEC = SlotSpec("here", 4, "vector")
SHAPES: dict[Layout, tuple[int, ...]] = {"vector": (3, 8), "sequence": (3, 7, 8), "image": (3, 8, 5, 6)}
BUILT_IN = [residual_mlp, bottleneck_adapter, depthwise_conv_adapter, lora]
PAIRS = [(b, layout) for b in BUILT_IN for layout in SHAPES if (b, layout) != (depthwise_conv_adapter, "vector")]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("blueprint", "layout"), PAIRS)
def test_a_fresh_branch_adds_nothing_and_has_a_gradient(blueprint: Blueprint, layout: Layout) -> None:
    """It keeps the shape, returns zeros, and its last layer has a non-zero gradient."""
    branch = blueprint(SlotSpec("s", 8, layout), _generator())
    out = branch(torch.randn(SHAPES[layout], generator=_generator(1)))
    assert torch.equal(out, torch.zeros(SHAPES[layout]))
    out.backward(torch.randn(SHAPES[layout], generator=_generator(2)))
    last = [p for p in branch.parameters() if p.dim() > 1][-1]
    assert last.grad is not None
    assert last.grad.abs().sum() > 0


@pytest.mark.parametrize(("blueprint", "layout"), PAIRS)
def test_the_generator_determines_the_values(blueprint: Blueprint, layout: Layout) -> None:
    """Values are finite and a function of the generator alone; the global RNG is unchanged."""
    before = torch.get_rng_state()
    first, again, other = (blueprint(SlotSpec("s", 8, layout), _generator(seed)).state_dict() for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) and first[name].isfinite().all() for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("blueprint", "layout"), PAIRS)
def test_freezing_and_evaluating_do_not_change_the_output(blueprint: Blueprint, layout: Layout) -> None:
    """The output is bit-equal in training and evaluation, trainable and frozen."""
    branch = blueprint(SlotSpec("s", 8, layout), _generator())
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=_generator(3)))
    h = torch.randn(SHAPES[layout], generator=_generator(1))
    training = branch.train()(h)
    assert torch.equal(training, branch.eval()(h))
    assert torch.equal(training, branch.train().requires_grad_(requires_grad=False)(h))


@pytest.mark.parametrize(
    ("blueprint", "features", "layout", "why"),
    [
        (depthwise_conv_adapter, 8, "vector", "no dimension to convolve"),
        (residual_mlp, 1, "image", "at least 2 features"),
        (bottleneck_adapter, 1, "sequence", "at least 2 features"),
        (lora, 1, "vector", "at least 2 features"),
    ],
)
def test_a_slot_that_does_not_fit_is_refused(blueprint: Blueprint, features: int, layout: Layout, why: str) -> None:
    """The error names the blueprint and the slot."""
    with pytest.raises(BlueprintMisfitError, match=f"{blueprint.__name__}' does not fit slot 'here': .*{why}"):
        blueprint(SlotSpec("here", features, layout), _generator())


def test_the_convolution_along_time_is_causal() -> None:
    """A change at one position of a sequence does not affect earlier ones."""
    branch = depthwise_conv_adapter(SlotSpec("s", 8, "sequence"), _generator())
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=_generator(3)))
    h = torch.randn(1, 6, 8, generator=_generator(1))
    later = h.clone()
    later[:, 4] += 1.0
    was, now = branch(h), branch(later)
    assert torch.equal(was[:, :4], now[:, :4])
    assert not torch.equal(was[:, 4], now[:, 4])


def test_lora_has_low_rank() -> None:
    """With any parameters its map has at most the rank that it was built with."""
    branch = lora(SlotSpec("s", 8, "vector"), _generator())
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=_generator(3)))
    assert torch.linalg.matrix_rank(branch(torch.eye(8))) == 4


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


def _ignoring(slot: SlotSpec, generator: torch.Generator) -> nn.Module:
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
    monkeypatch.setitem(sys.modules, "blueprints_under_test", sys.modules[__name__])
    return Blueprints([EntryPoint("b", f"blueprints_under_test:{attribute}", "tolaria.blueprints")])


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
def test_a_broken_blueprint_is_refused(
    monkeypatch: pytest.MonkeyPatch, attribute: str, error: type[Exception], why: str
) -> None:
    """Every fault of a blueprint raises an error that names it; the global RNG is unchanged."""
    before = torch.get_rng_state()
    with pytest.raises(error, match=why):
        _registry(monkeypatch, attribute).check("b", SPEC)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_blueprint_is_refused(blueprints: Blueprints) -> None:
    """The error lists the known ones."""
    with pytest.raises(UnknownBlueprintError, match="'unknown' is unknown; known are absent, bottleneck_adapter"):
        blueprints.build("unknown", SPEC, 0)


def test_a_blueprint_that_ignores_its_generator_is_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values drawn from the global RNG depend on the init seed, and the global RNG is unchanged."""
    found = _registry(monkeypatch, "_ignoring")
    before = torch.get_rng_state()
    first = found.build("b", SPEC, 1).state_dict()
    torch.manual_seed(99)
    again, other = (found.build("b", SPEC, seed).state_dict() for seed in (1, 2))
    torch.set_rng_state(before)
    assert torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["weight"], other["weight"])


def test_installed_reads_the_environment() -> None:
    """Blueprints that packages register under tolaria.blueprints are found by name."""
    assert isinstance(Blueprints.installed().names, frozenset)
