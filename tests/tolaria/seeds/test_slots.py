from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from leyline.v1.seeds_pb2 import SeedState
from tolaria.errors import BlueprintError, OwnershipError, SlotError
from tolaria.seeds import SeedSlot, SeedTopology, parameters_by_owner, training_seeds
from tolaria.seeds.slots import Graft, Layout, SlotSpec, seed_id_problem, slots_of
from tolaria.values.training import HOST

SPEC = SlotSpec("s", 4, "vector")


class Shifted(nn.Module):
    """A branch that yields one value everywhere, and a gradient to its only parameter."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.value = value

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h * self.weight + self.value
        return out


def _trainable(branch: nn.Module, *, isolated: bool = True) -> Graft:
    graft = Graft("a", branch, SPEC, isolated=isolated)
    graft.set_trainable(trainable=True)
    return graft


def test_an_empty_slot_is_the_identity() -> None:
    """Without seeds a slot returns its input, the same tensor."""
    h = torch.randn(2, 4)
    assert SeedSlot("s", features=4, layout="vector")(h) is h


def test_a_frozen_seed_at_alpha_zero_does_not_run() -> None:
    """It returns its input, the same tensor."""
    graft = Graft("a", Shifted(float("nan")), SPEC, isolated=True)
    h = torch.randn(2, 4)
    assert graft(h) is h


@pytest.mark.parametrize("value", [0.0, float("inf"), float("-inf"), float("nan")])
def test_a_training_seed_adds_exactly_zero(value: float) -> None:
    """The value is bit-equal, signs of zeros included, for every output of the branch."""
    h = torch.tensor([[0.0, -0.0, 1e-45, -3.0], [1e38, float("inf"), 2.0, -1e-30]])
    out = _trainable(Shifted(value))(h)
    assert torch.equal(out.view(torch.int32), h.view(torch.int32))


def test_an_isolated_training_seed_leaves_the_gradient_of_its_input() -> None:
    """The input gets the gradient that it would get without the seed; the branch gets its own."""
    h = torch.randn(2, 4, requires_grad=True)
    branch = Shifted(0.0)
    _trainable(branch)(h).backward(torch.full((2, 4), 3.0))
    assert h.grad is not None
    assert torch.equal(h.grad, torch.full((2, 4), 3.0))
    assert branch.weight.grad is not None
    torch.testing.assert_close(branch.weight.grad, 3.0 * h.detach().sum(0))


def test_without_isolation_the_gradient_of_the_branch_reaches_the_host() -> None:
    """The gradients add up, and the value is still exactly h."""
    h = torch.randn(2, 4, requires_grad=True)
    out = _trainable(Shifted(0.0), isolated=False)(h)
    out.sum().backward()
    assert h.grad is not None
    assert torch.equal(out, h)
    assert torch.equal(h.grad, torch.full((2, 4), 2.0))


def test_blending_is_h_plus_alpha_s() -> None:
    """Above alpha 0, value and gradients are those of h + alpha s(h)."""
    h = torch.randn(2, 4, requires_grad=True)
    graft = _trainable(Shifted(1.0))
    graft.alpha = 0.25
    out = graft(h)
    out.sum().backward()
    assert h.grad is not None
    torch.testing.assert_close(out, h + 0.25 * (h + 1.0))
    torch.testing.assert_close(h.grad, torch.full((2, 4), 1.25))


def test_a_host_may_continue_in_place_after_a_training_seed() -> None:
    """It does not overwrite what the branch saved for its backward pass."""
    branch = nn.Linear(4, 4)
    out = torch.relu_(_trainable(branch)(torch.randn(2, 4)))
    out.sum().backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    assert branch.weight.grad is not None


def test_the_dtype_of_the_host_is_kept() -> None:
    """A branch that returns another dtype does not change the host's."""
    graft = _trainable(Shifted(0.0))
    h = torch.randn(2, 4, dtype=torch.bfloat16)
    assert graft(h).dtype == torch.bfloat16
    graft.alpha = 0.5
    assert graft(h).dtype == torch.bfloat16


def test_freezing_drops_gradients() -> None:
    """A frozen seed has no gradients, and parameters that the blueprint froze are never unfrozen."""
    branch = nn.Linear(4, 4)
    branch.bias.requires_grad_(False)
    graft = _trainable(branch)
    assert (branch.weight.requires_grad, branch.bias.requires_grad) == (True, False)
    graft(torch.randn(2, 4)).sum().backward()
    graft.set_trainable(trainable=False)
    assert (branch.weight.requires_grad, branch.weight.grad) == (False, None)


def test_freezing_does_not_change_the_output_for_transposed_activations() -> None:
    """The output is bit-equal although the activations are not contiguous."""
    spec = SlotSpec("s", 8, "sequence")
    graft = Graft("a", nn.Linear(8, 8), spec, isolated=True)
    graft.alpha = 0.5
    h = torch.randn(64, 8, 2).transpose(1, 2)
    graft.set_trainable(trainable=True)
    before = graft(h)
    graft.set_trainable(trainable=False)
    assert torch.equal(before, graft(h))


def test_a_branch_that_changes_the_shape_is_refused() -> None:
    """The error names seed and slot."""
    with pytest.raises(BlueprintError, match=r"seed 'a' in slot 's': its branch made \(2, 1\) of \(2, 4\)"):
        _trainable(nn.Linear(4, 1))(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("layout", "shape"), [("vector", (2, 5)), ("vector", (2, 3, 4)), ("sequence", (2, 4, 3)), ("image", (2, 3, 4, 4))]
)
def test_activations_other_than_declared_are_refused(layout: Layout, shape: tuple[int, ...]) -> None:
    """Activations of another rank or number of features raise an error that names the slot."""
    with pytest.raises(SlotError, match=r"slot 's' is declared for .* with 4 features"):
        SeedSlot("s", features=4, layout=layout)(torch.randn(shape))


@pytest.mark.parametrize(("name", "features", "layout"), [("", 4, "vector"), ("s", 0, "vector"), ("s", 4, "cube")])
def test_an_invalid_slot_cannot_be_declared(name: str, features: int, layout: Layout) -> None:
    """A slot needs a name, features and a known layout."""
    with pytest.raises(SlotError, match="a slot has a name"):
        SeedSlot(name, features=features, layout=layout)


def test_two_slots_of_one_name_are_refused() -> None:
    """The error names both module paths."""
    slots = [SeedSlot("s", features=1, layout="vector") for _ in range(2)]
    with pytest.raises(SlotError, match="two slots are called 's': '0' and '1'"):
        slots_of(nn.Sequential(*slots))


def test_training_seeds_of_a_model() -> None:
    """A job finds the seeds of its model that are trained."""
    slot = SeedSlot("s", features=4, layout="vector")
    slot.arrange({"fossil": Graft("fossil", Shifted(0.0), SPEC, isolated=True), "trained": _trainable(Shifted(0.0))})
    assert training_seeds(nn.Sequential(slot)) == ("trained",)


@pytest.mark.parametrize("seed_id", ["", "a.b", "host", "keys", "training", "_modules", "x" * 129])
def test_ids_that_cannot_be_parameter_names(seed_id: str) -> None:
    """Ids that would break parameter names, or that name the host, are refused; all others are valid."""
    assert seed_id_problem(seed_id) is not None
    assert seed_id_problem("seed-1/ä b") is None


def test_slots_are_in_the_order_of_the_model(make_host: Callable[[], nn.Module]) -> None:
    """Each slot comes with its module path."""
    assert [(name, path) for name, (path, _) in slots_of(make_host()).items()] == [
        ("early", "body.1"),
        ("late", "late"),
    ]


def test_every_parameter_has_one_owner(host: nn.Module, topology: SeedTopology, seed: Callable[..., SeedState]) -> None:
    """A seed owns its branch in every stage; the host owns the rest, without overlap or gap."""
    topology.reconcile([seed("a", "GERMINATED"), seed("a2", "TRAINING", slot="early")], 0)
    owned = parameters_by_owner(host)
    assert list(owned) == [HOST, "a2", "a"]
    assert [name for name, _ in owned["a"]] == [
        f"late.seeds.a.branch.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]
    assert sorted(name for held in owned.values() for name, _ in held) == sorted(dict(host.named_parameters()))


def test_a_parameter_with_two_owners_is_refused(
    host: nn.Module, topology: SeedTopology, seed: Callable[..., SeedState]
) -> None:
    """The error names both owners and both names."""
    topology.reconcile([seed("a", "TRAINING")], 0)
    host.get_submodule("late.seeds.a.branch.0").weight = host.get_submodule("neck").weight
    with pytest.raises(
        OwnershipError, match=r"as 'neck.weight' by 'host' and as 'late.seeds.a.branch.0.weight' by 'a'"
    ):
        parameters_by_owner(host)


def test_a_parameter_tied_within_the_host_is_listed_once() -> None:
    """It appears under its first name."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, SeedSlot("s", features=2, layout="vector"), second)
    assert [name for name, _ in parameters_by_owner(model)[HOST]] == ["0.weight", "0.bias"]
