from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tolaria.errors import BlueprintError, SlotError
from tolaria.seeds import SeedSlot, training_seeds
from tolaria.seeds.slots import Graft, Layout, SlotSpec, seed_id_problem, slots_of

SPEC = SlotSpec("s", 4, "vector")


class Sick(nn.Module):
    """A branch that yields one value everywhere, and a gradient to its only parameter."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.value = value

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h * self.weight + self.value
        return out


def _learning(branch: nn.Module, *, isolated: bool = True) -> Graft:
    graft = Graft("a", branch, SPEC, isolated=isolated)
    graft.learn(learning=True)
    return graft


def test_empty_slot_is_identity() -> None:
    """Without seeds a slot returns the very tensor that it was given."""
    h = torch.randn(2, 4)
    assert SeedSlot("s", features=4, layout="vector")(h) is h


def test_silent_seed_is_not_run() -> None:
    """A seed that does not learn, at alpha 0, returns the very tensor without running its branch."""
    graft = Graft("a", Sick(float("nan")), SPEC, isolated=True)
    h = torch.randn(2, 4)
    assert graft(h) is h


@pytest.mark.parametrize("value", [0.0, float("inf"), float("-inf"), float("nan")])
def test_training_adds_exactly_zero(value: float) -> None:
    """The value is bit-equal, signs of zeros included, whatever the branch computes."""
    h = torch.tensor([[0.0, -0.0, 1e-45, -3.0], [1e38, float("inf"), 2.0, -1e-30]])
    out = _learning(Sick(value))(h)
    assert torch.equal(out.view(torch.int32), h.view(torch.int32))


def test_training_gradient_reaches_the_branch_alone() -> None:
    """What is before the seed gets the gradient that it would get without the seed; the branch gets its own."""
    h = torch.randn(2, 4, requires_grad=True)
    branch = Sick(0.0)
    _learning(branch)(h).backward(torch.full((2, 4), 3.0))
    assert h.grad is not None
    assert torch.equal(h.grad, torch.full((2, 4), 3.0))
    assert branch.weight.grad is not None
    torch.testing.assert_close(branch.weight.grad, 3.0 * h.detach().sum(0))


def test_without_isolation_the_host_hears_the_branch() -> None:
    """When isolation is off, the branch's gradient goes on into the host, and the value is still exactly h."""
    h = torch.randn(2, 4, requires_grad=True)
    out = _learning(Sick(0.0), isolated=False)(h)
    out.sum().backward()
    assert h.grad is not None
    assert torch.equal(out, h)
    assert torch.equal(h.grad, torch.full((2, 4), 2.0))


def test_blending_is_h_plus_alpha_s() -> None:
    """Above alpha 0, value and gradients are those of h + alpha s(h)."""
    h = torch.randn(2, 4, requires_grad=True)
    graft = _learning(Sick(1.0))
    graft.alpha = 0.25
    out = graft(h)
    out.sum().backward()
    assert h.grad is not None
    torch.testing.assert_close(out, h + 0.25 * (h + 1.0))
    torch.testing.assert_close(h.grad, torch.full((2, 4), 1.25))


def test_inplace_host_after_a_training_seed() -> None:
    """A host that goes on in place does not overwrite what the branch keeps for its backward pass."""
    branch = nn.Linear(4, 4)
    out = torch.relu_(_learning(branch)(torch.randn(2, 4)))
    out.sum().backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    assert branch.weight.grad is not None


def test_batched_vector_jacobian_products() -> None:
    """Rows of several sources can be taken through a training seed in one batched product."""
    h = torch.randn(2, 4, requires_grad=True)
    out = _learning(Sick(0.0))(h)
    losses = torch.stack([out.sum(), (2 * out).sum()])
    (rows,) = torch.autograd.grad(losses, [h], torch.eye(2), is_grads_batched=True)
    assert torch.equal(rows, torch.stack([torch.ones(2, 4), torch.full((2, 4), 2.0)]))


def test_dtype_of_the_host_stays() -> None:
    """A branch that answers in another precision does not change the host's."""
    graft = _learning(Sick(0.0))
    h = torch.randn(2, 4, dtype=torch.bfloat16)
    assert graft(h).dtype == torch.bfloat16
    graft.alpha = 0.5
    assert graft(h).dtype == torch.bfloat16


def test_freezing_drops_gradients() -> None:
    """A frozen seed holds no gradient, and what its blueprint froze is never unfrozen."""
    branch = nn.Linear(4, 4)
    branch.bias.requires_grad_(False)
    graft = _learning(branch)
    assert (branch.weight.requires_grad, branch.bias.requires_grad) == (True, False)
    graft(torch.randn(2, 4)).sum().backward()
    graft.learn(learning=False)
    assert (branch.weight.requires_grad, branch.weight.grad) == (False, None)


def test_freezing_behind_a_transposed_sequence() -> None:
    """Freezing leaves the output bit-equal where the host hands on activations that are not contiguous."""
    spec = SlotSpec("s", 8, "sequence")
    graft = Graft("a", nn.Linear(8, 8), spec, isolated=True)
    graft.alpha = 0.5
    h = torch.randn(64, 8, 2).transpose(1, 2)
    graft.learn(learning=True)
    before = graft(h)
    graft.learn(learning=False)
    assert torch.equal(before, graft(h))


def test_branch_that_changes_the_shape() -> None:
    """A branch whose output cannot be added is told by seed and slot."""
    with pytest.raises(BlueprintError, match=r"seed 'a' in slot 's': its branch made \(2, 1\) of \(2, 4\)"):
        _learning(nn.Linear(4, 1))(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("layout", "shape"), [("vector", (2, 5)), ("vector", (2, 3, 4)), ("sequence", (2, 4, 3)), ("image", (2, 3, 4, 4))]
)
def test_activations_other_than_declared(layout: Layout, shape: tuple[int, ...]) -> None:
    """Activations of another rank or with other features are refused by the slot's name."""
    with pytest.raises(SlotError, match=r"slot 's' is declared for .* with 4 features"):
        SeedSlot("s", features=4, layout=layout)(torch.randn(shape))


@pytest.mark.parametrize(("name", "features", "layout"), [("", 4, "vector"), ("s", 0, "vector"), ("s", 4, "cube")])
def test_impossible_slots(name: str, features: int, layout: Layout) -> None:
    """A slot without a name, features or a known layout cannot be declared."""
    with pytest.raises(SlotError, match="a slot has a name"):
        SeedSlot(name, features=features, layout=layout)


def test_two_slots_of_one_name() -> None:
    """Two slots of one name are refused with both paths."""
    slots = [SeedSlot("s", features=1, layout="vector") for _ in range(2)]
    with pytest.raises(SlotError, match="two slots are called 's': '0' and '1'"):
        slots_of(nn.Sequential(*slots))


def test_training_seeds_of_a_model() -> None:
    """A job finds the seeds that are trained now in its model."""
    slot = SeedSlot("s", features=4, layout="vector")
    slot.arrange({"fossil": Graft("fossil", Sick(0.0), SPEC, isolated=True), "young": _learning(Sick(0.0))})
    assert training_seeds(nn.Sequential(slot)) == ("young",)


@pytest.mark.parametrize("seed_id", ["", "a.b", "host", "keys", "training", "_modules", "x" * 129])
def test_ids_that_cannot_be_names(seed_id: str) -> None:
    """Ids that would break parameters' names, or mean the host, are told; all others can be names."""
    assert seed_id_problem(seed_id) is not None
    assert seed_id_problem("seed-1/ä b") is None


def test_slot_order_is_the_models(make_host: Callable[[], nn.Module]) -> None:
    """Slots are found with their module paths, in the model's order."""
    assert [(name, path) for name, (path, _) in slots_of(make_host()).items()] == [
        ("early", "body.1"),
        ("late", "late"),
    ]
