from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tolaria.errors import GradientMismatchError, NoGradientsError
from tolaria.gradients import FlatLayout, flat_to_grads, grads_to_flat

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=5)


@pytest.mark.parametrize("dtype", DTYPES)
@given(shapes=SHAPES)
def test_a_round_trip_gives_the_same_tensors(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
    """Values, shapes (scalars included), dtype and device are kept."""
    grads = [torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype) for shape in shapes]
    if sum(grad.numel() for grad in grads) == 0:
        return
    back = flat_to_grads(*grads_to_flat(grads))
    assert [grad.shape for grad in back] == [grad.shape for grad in grads]
    assert all(
        torch.equal(a, b) and a.dtype == dtype and a.device == b.device for a, b in zip(back, grads, strict=True)
    )


def test_the_flat_vector_is_a_copy() -> None:
    """Writing into it does not change the gradient, even if there is only one."""
    grad = torch.ones(3)
    flat, _ = grads_to_flat([grad])
    flat.zero_()
    assert torch.equal(grad, torch.ones(3))


@pytest.mark.parametrize("grads", [[], [torch.zeros(0)], [torch.zeros(0, 3), torch.zeros(0)]])
def test_nothing_to_flatten_is_an_error(grads: list[torch.Tensor]) -> None:
    """Gradients without elements raise NoGradientsError."""
    with pytest.raises(NoGradientsError, match=r"^no gradients available for aggregation$"):
        grads_to_flat(grads)


@pytest.mark.parametrize(
    ("second", "what"),
    [
        (torch.ones(2, dtype=torch.float64), "float64"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2, dtype=torch.int64), "int64"),
    ],
)
def test_mixed_gradients_are_refused_with_their_index(second: torch.Tensor, what: str) -> None:
    """The error names the gradient and the difference."""
    with pytest.raises(GradientMismatchError, match=rf"gradient 1: .*{what}") as caught:
        grads_to_flat([torch.ones(2), second])
    assert caught.value.index == 1


@pytest.mark.parametrize(("count", "index"), [(6, 2), (8, 3), (3, 1)])
def test_wrong_element_counts_are_refused(count: int, index: int) -> None:
    """Too few elements name the first shape that they cannot fill, too many the number of shapes."""
    with pytest.raises(GradientMismatchError) as caught:
        flat_to_grads(torch.zeros(count), [(2,), (2, 2), ()])
    assert caught.value.index == index


def test_only_vectors_can_be_split() -> None:
    """A matrix, an empty vector and an empty list of shapes are refused."""
    with pytest.raises(GradientMismatchError, match="one dimension, not 2"):
        flat_to_grads(torch.zeros(2, 2), [(4,)])
    with pytest.raises(NoGradientsError):
        flat_to_grads(torch.zeros(2), [])
    with pytest.raises(NoGradientsError):
        flat_to_grads(torch.zeros(0), [(0,)])


def test_layers_and_sizes_of_a_layout() -> None:
    """The layer of a parameter is its module; a name without a dot is its own layer."""
    layout = FlatLayout.of(
        [("a.b.weight", torch.zeros(2, 3)), ("a.b.bias", torch.zeros(2)), ("scale", torch.zeros(()))]
    )
    assert layout.layers == ("a.b", "a.b", "scale")
    assert layout.sizes == (6, 2, 1)
    assert layout.numel == 9
