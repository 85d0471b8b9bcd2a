from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tolaria.errors import GradientMismatchError, LossShapeError, NoGradientsError, UnknownSourceError
from tolaria.gradients import losses_by_source, sample_counts, source_rows
from tolaria.values.training import HOST


class TwoHeads(nn.Module):
    """A trunk with two heads; the second loss depends on both."""

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


def test_rows_are_the_gradients_of_each_loss() -> None:
    """Each row and own gradient equals that of a separate pass; the forward pass runs once."""
    net, inputs = TwoHeads(), torch.randn(5, 3)
    shared = list(net.trunk.parameters())
    own = {"a": list(net.first.parameters()), "b": list(net.second.parameters())}
    rows = source_rows(net.losses(inputs), shared, own=own)
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


def test_absent_sources_and_unused_parameters_have_zeros() -> None:
    """A source without a loss has a row of zeros and is absent; unused parameters have zero gradients."""
    used, unused, mine = (torch.ones(2, requires_grad=True) for _ in range(3))
    out = torch.full((2, 4), 7.0)
    rows = source_rows({"b": (3 * used).sum()}, [used, unused], names=["a", "b"], own={"b": [mine]}, out=out)
    assert rows.matrix is out
    assert rows.matrix.tolist() == [[0.0] * 4, [3.0, 3.0, 0.0, 0.0]]
    assert rows.present == (False, True)
    assert rows.own["b"] == (None,)


def test_isolated_seeds_have_no_row_but_their_own_gradient() -> None:
    """A source that is not among the names has gradients over its own parameters only."""
    shared, mine = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    losses = {HOST: shared.sum(), "s": (shared.detach() * mine * 5).sum()}
    rows = source_rows(losses, [shared], names=[HOST], own={"s": [mine]})
    assert rows.matrix.tolist() == [[1.0, 1.0]]
    gradient = rows.own["s"][0]
    assert gradient is not None
    assert gradient.tolist() == [5.0, 5.0]


def test_sources_with_one_loss_share_a_pass() -> None:
    """A single loss for several sources gives each of them the same row."""
    shared, mine, other = (torch.ones(2, requires_grad=True) for _ in range(3))
    loss = (shared * mine * other * 2).sum()
    rows = source_rows(
        {HOST: loss, "s": loss, "t": loss},
        [shared],
        names=[HOST, "s"],
        own={"s": [mine], "t": [other]},
    )
    assert rows.matrix.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert [gradient.tolist() for name in ("s", "t") for gradient in rows.own[name] if gradient is not None] == [
        [2.0, 2.0],
        [2.0, 2.0],
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_have_the_parameters_dtype(dtype: torch.dtype) -> None:
    """Scalar parameters are included."""
    vector, scalar = torch.ones(2, dtype=dtype, requires_grad=True), torch.tensor(2.0, dtype=dtype, requires_grad=True)
    rows = source_rows({"a": (vector * scalar).sum()}, [vector, scalar])
    assert rows.matrix.dtype == dtype
    assert rows.matrix.tolist() == [[2.0, 2.0, 2.0]]


def test_losses_without_gradients_are_refused() -> None:
    """The error names the source and the problem."""
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


def test_losses_split_by_seed_add_up_to_the_batch_mean() -> None:
    """Samples of unknown seeds belong to the host."""
    per_sample = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    seed_ids = ["s", "", "culled", "s"]
    losses = losses_by_source(per_sample, seed_ids, [HOST, "s", "t"])
    assert {name: loss.item() for name, loss in losses.items()} == {"s": 1.25, HOST: 1.25}
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert per_sample.grad is not None
    assert per_sample.grad.tolist() == [0.25] * 4
    assert sample_counts(seed_ids, [HOST, "s", "t"]) == {"s": 2, HOST: 2}


def test_ids_that_do_not_match_the_samples_are_refused() -> None:
    """One id too few, or losses that are not a vector, raise an error."""
    with pytest.raises(GradientMismatchError, match="gradient 1: 1 seed ids for 2 samples"):
        losses_by_source(torch.ones(2, requires_grad=True), ["s"], ["s"])
    with pytest.raises(LossShapeError):
        losses_by_source(torch.ones(2, 2, requires_grad=True), ["s", "s"], ["s"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_under_autocast_on_a_device() -> None:
    """In mixed precision the rows are float32 like the parameters, on the device."""
    net = TwoHeads().cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        losses = net.losses(torch.randn(5, 3, device="cuda"))
    rows = source_rows(losses, list(net.trunk.parameters()))
    assert rows.matrix.dtype == torch.float32
    assert rows.matrix.device.type == "cuda"
    assert rows.matrix.isfinite().all()


def test_rows_under_autocast_on_the_cpu() -> None:
    """In mixed precision the rows are float32 like the parameters."""
    net = TwoHeads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = net.losses(torch.randn(5, 3))
    rows = source_rows(losses, list(net.trunk.parameters()))
    assert rows.matrix.dtype == torch.float32
    assert rows.matrix.isfinite().all()
