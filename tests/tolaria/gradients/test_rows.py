from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from tolaria.errors import GradientMismatchError, LossShapeError, NoGradientsError, UnknownSourceError
from tolaria.gradients import losses_by_source, sample_counts, source_rows
from tolaria.values.training import HOST

if TYPE_CHECKING:
    from torch import Tensor


class Unbatchable(torch.autograd.Function):
    """Doubles its input; its backward reads a number out of the gradient, which no batching rule can follow."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grads[0].sum().item()
        return grads[0] * 2


class Twins(nn.Module):
    """A trunk with two heads, of which the second also hears the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1)
        self.passes = 0

    def losses(self, inputs: Tensor) -> dict[str, Tensor]:
        self.passes += 1
        features = self.trunk(inputs)
        first = self.first(features)
        return {"a": first.square().mean(), "b": (self.second(features) + first).abs().sum()}


@pytest.mark.parametrize("batched", [True, False])
def test_rows_are_the_gradients_of_each_loss(batched: bool) -> None:
    """Each row and each own gradient equals that of a separate forward and backward pass; the forward ran once."""
    net, inputs = Twins(), torch.randn(5, 3)
    shared = list(net.trunk.parameters())
    own = {"a": list(net.first.parameters()), "b": list(net.second.parameters())}
    rows = source_rows(net.losses(inputs), shared, own=own, batched=batched)
    assert net.passes == 1
    assert rows.names == ("a", "b")
    assert rows.present == (True, True)
    for place, name in enumerate(rows.names):
        expected = torch.autograd.grad(net.losses(inputs)[name], [*shared, *own[name]])
        torch.testing.assert_close(
            rows.matrix[place], torch.cat([grad.reshape(-1) for grad in expected[: len(shared)]])
        )
        torch.testing.assert_close(rows.own[name], expected[len(shared) :])
    assert all(parameter.grad is None for parameter in net.parameters())


def test_an_operation_without_batching_rule_falls_back() -> None:
    """Asked for batched products, a graph that cannot be batched gives the same rows pass by pass."""
    weight = torch.ones(3, requires_grad=True)
    doubled: Tensor = Unbatchable.apply(weight)  # type: ignore[no-untyped-call]
    rows = source_rows({"a": doubled.sum(), "b": doubled.square().sum()}, [weight], batched=True)
    assert rows.matrix.tolist() == [[2.0] * 3, [8.0] * 3]


@pytest.mark.parametrize("batched", [True, False])
def test_absent_sources_and_unused_parameters_have_zeros(batched: bool) -> None:
    """A source without a loss has a row of zeros and is not present; a parameter that a loss misses counts as zero."""
    used, unused, mine = (torch.ones(2, requires_grad=True) for _ in range(3))
    out = torch.full((2, 4), 7.0)
    rows = source_rows(
        {"b": (3 * used).sum()}, [used, unused], names=["a", "b"], own={"b": [mine]}, out=out, batched=batched
    )
    assert rows.matrix is out
    assert rows.matrix.tolist() == [[0.0] * 4, [3.0, 3.0, 0.0, 0.0]]
    assert rows.present == (False, True)
    assert rows.own["b"] == (None,)


@pytest.mark.parametrize("batched", [True, False])
def test_isolated_seeds_have_no_row_but_their_own_gradient(batched: bool) -> None:
    """A source that is not among the names moves its own parameters only."""
    shared, mine = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    losses = {HOST: shared.sum(), "s": (shared.detach() * mine * 5).sum()}
    rows = source_rows(losses, [shared], names=[HOST], own={"s": [mine]}, batched=batched)
    assert rows.matrix.tolist() == [[1.0, 1.0]]
    gradient = rows.own["s"][0]
    assert gradient is not None
    assert gradient.tolist() == [5.0, 5.0]


@pytest.mark.parametrize("batched", [True, False])
def test_sources_with_one_loss_share_a_pass(batched: bool) -> None:
    """A job with a single loss for all of its seeds gets it for each of them."""
    shared, mine, other = (torch.ones(2, requires_grad=True) for _ in range(3))
    loss = (shared * mine * other * 2).sum()
    rows = source_rows(
        {HOST: loss, "s": loss, "t": loss},
        [shared],
        names=[HOST, "s"],
        own={"s": [mine], "t": [other]},
        batched=batched,
    )
    assert rows.matrix.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert [gradient.tolist() for name in ("s", "t") for gradient in rows.own[name] if gradient is not None] == [
        [2.0, 2.0],
        [2.0, 2.0],
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_have_the_parameters_dtype(dtype: torch.dtype) -> None:
    """Scalars among the parameters included."""
    vector, scalar = torch.ones(2, dtype=dtype, requires_grad=True), torch.tensor(2.0, dtype=dtype, requires_grad=True)
    rows = source_rows({"a": (vector * scalar).sum()}, [vector, scalar])
    assert rows.matrix.dtype == dtype
    assert rows.matrix.tolist() == [[2.0, 2.0, 2.0]]


def test_losses_that_nothing_flows_from_are_refused() -> None:
    """The source is named, and what is wrong with its loss."""
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(LossShapeError, match=r"'b' has shape \(2,\)"):
        source_rows({"a": weight.sum(), "b": weight * 1}, [weight])
    with pytest.raises(LossShapeError, match="'a' depends on no parameter"):
        source_rows({"a": torch.tensor(1.0)}, [weight])
    with pytest.raises(NoGradientsError):
        source_rows({}, [weight])
    with pytest.raises(NoGradientsError):
        source_rows({"a": weight.sum()}, [])
    with pytest.raises(UnknownSourceError, match="'c' owns parameters"):
        source_rows({"a": weight.sum()}, [weight], own={"c": [weight]})
    with pytest.raises(GradientMismatchError, match=r"\(1, 3\), not \(1, 2\)"):
        source_rows({"a": weight.sum()}, [weight], out=torch.empty(1, 3))


def test_a_batchs_losses_split_by_seed_add_up() -> None:
    """Per-sample losses go to their seeds, strangers' to the host, and the sum stays the batch's mean loss."""
    per_sample = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    seed_ids = ["s", "", "culled", "s"]
    losses = losses_by_source(per_sample, seed_ids, [HOST, "s", "t"])
    assert {name: loss.item() for name, loss in losses.items()} == {"s": 1.25, HOST: 1.25}
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert per_sample.grad is not None
    assert per_sample.grad.tolist() == [0.25] * 4
    assert sample_counts(seed_ids, [HOST, "s", "t"]) == {"s": 2, HOST: 2}


def test_ids_that_do_not_match_the_samples_are_refused() -> None:
    """One id too few, or losses that are no vector."""
    with pytest.raises(GradientMismatchError, match="gradient 1: 1 seed ids for 2 samples"):
        losses_by_source(torch.ones(2, requires_grad=True), ["s"], ["s"])
    with pytest.raises(LossShapeError):
        losses_by_source(torch.ones(2, 2, requires_grad=True), ["s", "s"], ["s"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batched", [True, False])
def test_rows_under_autocast_on_a_device(batched: bool) -> None:
    """With mixed precision the rows are float32 like the parameters, and stay on the device."""
    net = Twins().cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        losses = net.losses(torch.randn(5, 3, device="cuda"))
    rows = source_rows(losses, list(net.trunk.parameters()), batched=batched)
    assert rows.matrix.dtype == torch.float32
    assert rows.matrix.device.type == "cuda"
    assert rows.matrix.isfinite().all()


def test_rows_under_autocast_on_the_processor() -> None:
    """With mixed precision the rows are float32 like the parameters."""
    net = Twins()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = net.losses(torch.randn(5, 3))
    rows = source_rows(losses, list(net.trunk.parameters()))
    assert rows.matrix.dtype == torch.float32
    assert rows.matrix.isfinite().all()
