from __future__ import annotations

import pytest
import torch

from tolaria.errors import BlueprintMisfitError
from tolaria.seeds import Blueprint, SlotSpec, bottleneck_adapter, depthwise_conv_adapter, lora, residual_mlp
from tolaria.seeds.slots import Layout

SHAPES: dict[Layout, tuple[int, ...]] = {"vector": (3, 8), "sequence": (3, 7, 8), "image": (3, 8, 5, 6)}
BUILT_IN = [residual_mlp, bottleneck_adapter, depthwise_conv_adapter, lora]
PAIRS = [(b, layout) for b in BUILT_IN for layout in SHAPES if (b, layout) != (depthwise_conv_adapter, "vector")]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("blueprint", "layout"), PAIRS)
def test_begins_at_nothing_and_can_learn(blueprint: Blueprint, layout: Layout) -> None:
    """A fresh branch keeps the shape, adds nothing, and its last layer has a gradient that is not zero."""
    branch = blueprint(SlotSpec("s", 8, layout), _generator())
    out = branch(torch.randn(SHAPES[layout], generator=_generator(1)))
    assert torch.equal(out, torch.zeros(SHAPES[layout]))
    out.backward(torch.randn(SHAPES[layout], generator=_generator(2)))
    last = [p for p in branch.parameters() if p.dim() > 1][-1]
    assert last.grad is not None
    assert last.grad.abs().sum() > 0


@pytest.mark.parametrize(("blueprint", "layout"), PAIRS)
def test_same_generator_same_values(blueprint: Blueprint, layout: Layout) -> None:
    """Values are a function of the generator alone, finite, and the global RNG is not drawn from."""
    before = torch.get_rng_state()
    first, again, other = (blueprint(SlotSpec("s", 8, layout), _generator(seed)).state_dict() for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) and first[name].isfinite().all() for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("blueprint", "layout"), PAIRS)
def test_freezing_and_evaluating_change_nothing(blueprint: Blueprint, layout: Layout) -> None:
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
def test_misfits(blueprint: Blueprint, features: int, layout: Layout, why: str) -> None:
    """A slot where a blueprint makes no sense is refused, naming both."""
    with pytest.raises(BlueprintMisfitError, match=f"{blueprint.__name__}' does not fit slot 'here': .*{why}"):
        blueprint(SlotSpec("here", features, layout), _generator())


def test_convolution_along_time_sees_the_past_only() -> None:
    """Changing a later position of a sequence changes nothing before it."""
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
    """Whatever it learns, its map has at most the rank it was built with."""
    branch = lora(SlotSpec("s", 8, "vector"), _generator())
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=_generator(3)))
    assert torch.linalg.matrix_rank(branch(torch.eye(8))) == 4
