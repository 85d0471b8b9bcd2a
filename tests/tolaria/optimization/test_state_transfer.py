from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tolaria.optimization.state_transfer import Form, can_fit, fit_entry, fit_state

torch.set_num_threads(1)

SIZES = st.integers(1, 5)


def form(*shape: int, dtype: torch.dtype = torch.float32) -> Form:
    """The form of a parameter of that shape."""
    return Form.of(torch.empty(shape, dtype=dtype))


def test_unchanged_state_is_the_same_tensor() -> None:
    """Nothing is copied if form and layout did not change."""
    value = torch.randn(2, 3)
    assert fit_entry("exp_avg", value, form(2, 3), torch.empty(2, 3)) is value


def test_a_grown_part_takes_the_mean_along_the_grown_dimension() -> None:
    """New columns have the mean of each row, new rows that of each column; the old part is bit-equal."""
    value = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    wider = fit_entry("exp_avg", value, form(2, 2), torch.empty(2, 4))
    taller = fit_entry("exp_avg", value, form(2, 2), torch.empty(3, 2))
    assert wider.tolist() == [[1, 3, 2, 2], [5, 7, 6, 6]]
    assert taller.tolist() == [[1, 3], [5, 7], [3, 5]]


def test_plain_momentum_takes_a_tenth_of_the_mean() -> None:
    """This includes the corner where two dimensions grew; the old part is not scaled."""
    value = torch.tensor([[10.0, 30.0], [50.0, 70.0]])
    grown = fit_entry("momentum_buffer", value, form(2, 2), torch.empty(3, 3))
    assert torch.allclose(grown, torch.tensor([[10.0, 30.0, 2.0], [50.0, 70.0, 6.0], [3.0, 5.0, 4.0]]))
    assert torch.equal(grown[:2, :2], value)


def test_a_dimension_that_shrinks_is_cut() -> None:
    """The rest is bit-equal, in new storage."""
    value = torch.randn(4, 3)
    cut = fit_entry("momentum_buffer", value, form(4, 3), torch.empty(2, 3))
    assert torch.equal(cut, value[:2])
    assert cut.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()


def test_one_dimension_may_grow_while_another_shrinks() -> None:
    """The mean is that of the kept part."""
    value = torch.tensor([[1.0, 100.0], [3.0, 100.0]])
    assert fit_entry("exp_avg", value, form(2, 2), torch.empty(3, 1)).tolist() == [[1], [3], [2]]


def test_an_average_of_the_weights_takes_the_new_weights() -> None:
    """The new part of ASGD's average is the new part of the parameter."""
    parameter = torch.tensor([7.0, 8.0, 9.0], requires_grad=True)
    average = fit_entry("ax", torch.tensor([1.0, 2.0]), form(2), parameter)
    assert average.tolist() == [1.0, 2.0, 9.0]
    assert not average.requires_grad


@pytest.mark.parametrize(
    ("key", "old", "new", "shape"),
    [
        ("row_var", (2, 3), (4, 5), (4, 1)),
        ("col_var", (2, 3), (4, 5), (1, 5)),
        ("row_var", (2, 1), (2, 5), (2, 1)),
        ("col_var", (1, 3), (4, 3), (1, 3)),
    ],
)
def test_factored_moments_keep_their_reduced_dimension(
    key: str, old: tuple[int, ...], new: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """Adafactor's means along one dimension grow only along the other."""
    parameter = torch.empty(old)
    value = parameter.new_ones(old[0], 1) if key == "row_var" else parameter.new_ones(1, old[1])
    assert fit_entry(key, value, form(*old), torch.empty(new)).shape == shape


def test_counters_and_plain_values_are_unchanged() -> None:
    """Step counters, scalars and entries that are not tensors are passed as they are."""
    step, scalar = torch.tensor(5.0), torch.tensor(0.5)
    state = {"step": step, "mu_product": scalar, "note": "x", "exp_avg": torch.ones(2)}
    carried = fit_state(state, form(2), torch.empty(3))
    assert carried["step"] is step
    assert carried["mu_product"] is scalar
    assert carried["note"] == "x"
    assert carried["exp_avg"].shape == (3,)


def test_state_in_the_dtype_of_the_parameter_follows_it() -> None:
    """State in the old parameter's dtype takes the new one; state in another dtype keeps it."""
    value = torch.tensor([1.0, 2.0])
    half = torch.empty(3, dtype=torch.bfloat16)
    assert fit_entry("exp_avg", value, form(2), half).dtype == torch.bfloat16
    assert fit_entry("exp_avg", value, form(2, dtype=torch.bfloat16), half).dtype == torch.float32


def test_state_takes_the_memory_layout_of_the_parameter() -> None:
    """State of a channels-last parameter is channels-last too, as fused kernels need."""
    parameter = torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last)
    value = torch.randn(2, 3, 4, 4)
    carried = fit_entry("exp_avg", value, form(2, 3, 4, 4), parameter)
    assert carried.stride() == parameter.stride()
    assert torch.equal(carried, value)


def test_unrelated_state_is_an_error() -> None:
    """Neither an unrelated shape nor integers can be fitted."""
    with pytest.raises(ValueError, match=r"'odd' of shape \(7,\) does not belong to \(2,\)"):
        fit_entry("odd", torch.ones(7), form(2), torch.empty(3))
    with pytest.raises(ValueError, match=r"'count' of dtype torch\.int64 cannot change"):
        fit_entry("count", torch.ones(2, dtype=torch.int64), form(2), torch.empty(3))


def test_state_cannot_be_fitted_to_another_number_of_dimensions() -> None:
    """Neither a matrix to a vector nor an empty tensor can be fitted."""
    assert can_fit(form(2, 3), torch.empty(4, 5))
    assert not can_fit(form(2, 3), torch.empty(6))
    assert not can_fit(form(0), torch.empty(6))


@given(
    old=st.tuples(SIZES, SIZES, SIZES), new=st.tuples(SIZES, SIZES, SIZES), key=st.sampled_from(["exp_avg_sq", "sum"])
)
def test_second_moments_never_become_negative(old: tuple[int, int, int], new: tuple[int, int, int], key: str) -> None:
    """The kept part is bit-equal, and no number exceeds the old maximum."""
    value: Tensor = torch.rand(old).square()
    carried = fit_entry(key, value, form(*old), torch.empty(new))
    kept = tuple(slice(0, min(a, b)) for a, b in zip(old, new, strict=True))
    assert carried.shape == new
    assert torch.equal(carried[kept], value[kept])
    assert carried.min() >= 0.0
    assert carried.max() <= value.max() * (1 + 1e-6)


@given(old=SIZES, new=SIZES)
def test_the_greatest_second_moment_stays_the_greatest(old: int, new: int) -> None:
    """AMSGrad's running maximum is never below the moment."""
    moment = torch.rand(old)
    most = moment + torch.rand(old)
    parameter = torch.empty(new)
    moment, most = (
        fit_entry(key, value, form(old), parameter) for key, value in (("exp_avg_sq", moment), ("max_exp_avg_sq", most))
    )
    assert bool((most >= moment).all())
