from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria.errors import GradientMismatchError, GradientWeightError, NoGradientsError
from tolaria.gradients import aggregate_weighted, combine_flat_grads

if TYPE_CHECKING:
    from collections.abc import Callable

BAD_WEIGHTS = [
    ([1.0, math.nan], 1, "weight 1: nan is not finite"),
    ([math.inf, 1.0], 0, "weight 0: inf is not finite"),
    ([1.0, -0.5], 1, "weight 1: -0.5 is negative"),
    ([0.0, 0.0], None, "their sum is 0"),
    ([1e308, 1e308], None, "their sum is inf"),
    ([1.0], None, "1 given for 2"),
    ([], None, "0 given for 2"),
]


@settings(deadline=None)  # the machine may be busy; time is for benchmarks
@given(
    shape=st.lists(st.integers(1, 3), max_size=4).map(tuple),
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=5).filter(lambda weights: sum(weights) > 1e-3),
)
def test_weights_broadcast_over_any_rank(shape: tuple[int, ...], weights: list[float]) -> None:
    """One weight weighs one whole tensor, from scalars to rank four, given as a list or stacked."""
    tensors = [
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(len(weights))
    ]
    expected = sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True)) / sum(weights)
    for given_tensors in (tensors, torch.stack(tensors)):
        merged = aggregate_weighted(given_tensors, weights)
        torch.testing.assert_close(merged, torch.as_tensor(expected))
        assert merged.shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_stays(dtype: torch.dtype) -> None:
    """Every real dtype comes back as itself."""
    merged = aggregate_weighted([torch.tensor(1.0, dtype=dtype), torch.tensor(4.0, dtype=dtype)], torch.tensor([1, 2]))
    assert merged.dtype == dtype
    assert merged.item() == pytest.approx(3.0, rel=1e-2)


def test_halves_are_summed_wide() -> None:
    """A thousand half-precision rows do not lose the small ones to rounding on the way."""
    rows = [torch.ones(1, dtype=torch.float16)] * 4001
    assert aggregate_weighted(rows, [1.0] * 4001).item() == 1.0


@pytest.mark.parametrize(("weights", "index", "message"), BAD_WEIGHTS)
@pytest.mark.parametrize("use_pcgrad", [True, False, None])
def test_unusable_weights_are_refused(
    weights: list[float], index: int | None, message: str, use_pcgrad: bool | None
) -> None:
    """NaN, infinite, negative, all zero or too few: an error with the index, however rows are merged."""
    rows = [torch.ones(2), torch.ones(2)]
    merge: Callable[[], object] = partial(aggregate_weighted, rows, weights)
    if use_pcgrad is not None:
        merge = partial(combine_flat_grads, rows, weights=weights, use_pcgrad=use_pcgrad)
    with pytest.raises(GradientWeightError, match=message) as caught:
        merge()
    assert caught.value.index == index


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.ones(2), torch.ones(2), torch.ones(3)], r"gradient 2: shape \(3,\)"),
        ([torch.ones(2), torch.ones(2).double()], "gradient 1: dtype"),
        ([torch.ones(2), torch.ones(2, device="meta")], "gradient 1: device"),
    ],
)
def test_mixed_tensors_are_refused(tensors: list[torch.Tensor], message: str) -> None:
    """The first tensor that differs is named."""
    with pytest.raises(GradientMismatchError, match=message):
        aggregate_weighted(tensors, [1.0] * len(tensors))


def test_no_tensors_is_an_error() -> None:
    """Nothing has no mean."""
    with pytest.raises(NoGradientsError):
        aggregate_weighted([], [])
