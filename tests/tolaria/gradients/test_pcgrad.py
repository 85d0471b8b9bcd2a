from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tolaria.errors import GradientMismatchError, NoGradientsError
from tolaria.gradients import combine_flat_grads, step_generator
from tolaria.gradients.gram import gram_matrix
from tolaria.gradients.pcgrad import projection_order

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-13}


def reference(rows: Sequence[Tensor], order: Sequence[Sequence[int]], weights: Sequence[float] | None = None) -> Tensor:
    """PCGrad as in the paper, in float64."""
    given_rows = [row.double() for row in rows]
    projected = []
    for row, others in zip(given_rows, order, strict=True):
        current = row.clone()
        for other in others:
            dot, square = torch.dot(current, given_rows[other]), torch.dot(given_rows[other], given_rows[other])
            if dot < 0 and square > 0:
                current -= dot / square * given_rows[other]
        projected.append(current)
    factors = torch.ones(len(rows)).double() if weights is None else torch.tensor(weights).double() / sum(weights)
    return (factors[:, None] * torch.stack(projected)).sum(0)


@st.composite
def matrices(draw: st.DrawFn, *, min_rows: int = 1, max_rows: int = 6, scales: bool = False) -> Tensor:
    """Rows of small integers, among them zero, equal, opposite, dependent and orthogonal rows."""
    shape = draw(st.integers(min_rows, max_rows)), draw(st.integers(1, 5))
    numbers = draw(st.lists(st.integers(-3, 3), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    matrix = torch.tensor(numbers, dtype=torch.float64).reshape(shape)
    if scales:
        exponents = draw(st.lists(st.integers(-15, 15), min_size=shape[0], max_size=shape[0]))
        matrix *= torch.tensor([10.0**exponent for exponent in exponents])[:, None]
    return matrix


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_conflicting_rows_give_the_known_vector(dtype: torch.dtype) -> None:
    """(-4, 1, 1) and (6, 1, 1): computed by hand, both rows projected, one conflict."""
    merged = combine_flat_grads([torch.tensor([-4, 1, 1], dtype=dtype), torch.tensor([6, 1, 1], dtype=dtype)])
    expected = torch.tensor([100 / 171, 650 / 171, 650 / 171], dtype=torch.float64)
    torch.testing.assert_close(merged.vector.double(), expected, rtol=TOLERANCE[dtype], atol=0)
    assert merged.vector.dtype == dtype
    assert (merged.conflicts, merged.grad_conflict_rate, merged.pair_conflict_rate) == (1, 1.0, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_conflict_give_their_sum(dtype: torch.dtype) -> None:
    """Rows at angles of at most 90 degrees are added up."""
    merged = combine_flat_grads([torch.tensor(row, dtype=dtype) for row in ([1, 0, 0], [0, 2, 0], [1, 1, 4])])
    assert merged.vector.tolist() == [2, 3, 4]
    assert merged.conflicts == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_row_is_returned_unchanged(dtype: torch.dtype) -> None:
    """The result has the same bits in new memory, for any weight."""
    row = torch.randn(5).to(dtype)
    for flats in ([row], row[None]):
        merged = combine_flat_grads(flats, weights=[0.25])
        assert torch.equal(merged.vector, row)
        assert merged.vector.data_ptr() != row.data_ptr()
        assert (merged.conflicts, merged.grad_conflict_rate, merged.pair_conflict_rate) == (0, 0.0, 0.0)


@given(row=st.lists(st.integers(-100, 100), min_size=1, max_size=6))
def test_two_opposite_rows_give_zero(row: list[int]) -> None:
    """Exactly opposite rows cancel."""
    tensor = torch.tensor(row, dtype=torch.float32)
    assert not combine_flat_grads([tensor, -tensor]).vector.any()


@given(matrix=matrices(), seed=st.integers(0, 2**32), weighted=st.booleans())
def test_agrees_with_the_pairwise_loop(matrix: Tensor, seed: int, weighted: bool) -> None:
    """The result in Gram space equals that of projecting vector by vector in the same order."""
    weights = [1.0 + index for index in range(len(matrix))] if weighted else None
    order = projection_order(len(matrix), torch.Generator().manual_seed(seed))
    merged = combine_flat_grads(matrix, weights=weights, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(merged.vector, reference(list(matrix), order, weights), rtol=1e-6, atol=1e-6)
    whole = matrix.long()
    dots = whole @ whole.T
    assert merged.conflicts == int((dots < 0).sum()) // 2


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_agree_with_float64(dtype: torch.dtype, as_list: bool) -> None:
    """Beyond one chunk and one slice, with an odd rest, the error stays at that of the dtype: 1e-6 in float32."""
    matrix = torch.randn(6, 600_001, generator=torch.Generator().manual_seed(3)).to(dtype)
    order = projection_order(6, step_generator("run", 1))
    merged = combine_flat_grads(list(matrix) if as_list else matrix, generator=step_generator("run", 1))
    expected = reference(list(matrix), order)
    error = (merged.vector.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]


@given(matrix=matrices(min_rows=2, max_rows=2))
def test_the_merge_of_two_rows_opposes_neither(matrix: Tensor) -> None:
    """The merged gradient has no negative dot product with either row."""
    vector = combine_flat_grads(matrix).vector
    norms = matrix.norm(dim=1)
    assert ((matrix @ vector) >= -1e-6 * norms * norms.sum()).all()


@given(matrix=matrices(min_rows=2), scales=st.lists(st.floats(1e-15, 1e15), min_size=6, max_size=6))
def test_scale_does_not_change_which_pairs_conflict(matrix: Tensor, scales: list[float]) -> None:
    """Rows times positive factors conflict as before, right angles included."""
    rows = matrix.float()
    scaled = rows * torch.tensor(scales[: len(rows)])[:, None]
    assert combine_flat_grads(scaled).conflicts == combine_flat_grads(rows).conflicts


@pytest.mark.parametrize("numel", [5, 40_000])
@pytest.mark.parametrize("exponents", [(-15, 15), (15, -15), (-15, -15), (15, 15), (-30, 3), (-25, 15), (18, 18)])
def test_extreme_scales_stay_finite_and_right(exponents: tuple[int, int], numel: int) -> None:
    """Scales whose squares exceed float32, combined in one merge, give the float64 result."""
    base = torch.randn(2, numel, generator=torch.Generator().manual_seed(0))
    base[1] -= 2 * base[0]
    rows = base * torch.tensor([10.0**exponent for exponent in exponents])[:, None]
    merged = combine_flat_grads(rows, generator=step_generator(1, 1))
    expected = reference(list(rows), projection_order(2, step_generator(1, 1)))
    assert merged.conflicts == 1
    assert merged.vector.isfinite().all()
    torch.testing.assert_close(merged.vector.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@given(matrix=matrices(scales=True))
def test_result_is_finite(matrix: Tensor) -> None:
    """Zero rows, dependent rows and scales from 1e-15 to 1e15 give finite results."""
    assert combine_flat_grads(matrix).vector.isfinite().all()
    assert combine_flat_grads(matrix.float()).vector.isfinite().all()


@pytest.mark.parametrize("numel", [3, 40_000])
def test_zero_rows_take_no_part(numel: int) -> None:
    """A row of zeros never conflicts and is no participant."""
    row = torch.ones(numel)
    merged = combine_flat_grads([row, torch.zeros(numel), -2 * row, torch.zeros(numel)])
    assert (merged.conflicts, merged.participants, merged.grad_conflict_rate) == (1, 2, 1.0)
    assert not merged.vector.any()
    assert not combine_flat_grads(torch.zeros(3, numel)).vector.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("numel", [3, 40_000])
def test_a_row_that_is_not_finite_shows_in_the_result(bad: float, numel: int) -> None:
    """It is not projected away, so that the step is skipped."""
    row = torch.ones(numel)
    broken = -row
    broken[1] = bad
    merged = combine_flat_grads([row, broken, -row])
    assert not merged.vector.isfinite().all()
    assert merged.conflicts == 1


def test_conflict_rates_have_their_formulas() -> None:
    """Three rows that all conflict: three conflicts, a rate of 1.5, a pair rate of 1."""
    rows = [torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 0.9]), torch.tensor([-0.5, -0.9])]
    merged = combine_flat_grads(rows)
    assert (merged.conflicts, merged.grad_conflict_rate, merged.pair_conflict_rate) == (3, 1.5, 1.0)


@given(matrix=matrices(min_rows=2))
def test_inputs_and_the_global_rng_are_unchanged(matrix: Tensor) -> None:
    """No row is modified, and the global RNG is not used."""
    before, states = matrix.clone(), (torch.random.get_rng_state(), random.getstate())
    combine_flat_grads(matrix, generator=step_generator("run", 7)).vector.fill_(9.0)
    combine_flat_grads(list(matrix))
    assert torch.equal(matrix, before)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_same_run_and_step_give_the_same_bits() -> None:
    """A repeated step gives the same bits; another step or run draws another order."""
    rows = torch.randn(7, 50_000, generator=torch.Generator().manual_seed(1))
    results = {
        key: combine_flat_grads(rows, generator=step_generator(*key)).vector for key in [("a", 1), ("a", 2), ("b", 1)]
    }
    assert torch.equal(results["a", 1], combine_flat_grads(rows, generator=step_generator("a", 1)).vector)
    assert not torch.equal(results["a", 1], results["a", 2])
    assert not torch.equal(results["a", 1], results["b", 1])


def test_order_is_a_permutation_of_the_others() -> None:
    """Every row is projected against every other row once, never against itself."""
    order = projection_order(9, step_generator("a", 1))
    assert [sorted(others) for others in order] == [[j for j in range(9) if j != i] for i in range(9)]


def test_projection_is_against_the_original_row() -> None:
    """A row that was projected before is still removed with its original direction (Yu et al. 2020)."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])
    merged = combine_flat_grads(rows, generator=step_generator(0, 0))
    order = projection_order(3, step_generator(0, 0))
    torch.testing.assert_close(merged.vector.double(), reference(list(rows), order), atol=1e-6, rtol=0)


@given(matrix=matrices(min_rows=2))
def test_without_pcgrad_rows_are_summed_or_averaged(matrix: Tensor) -> None:
    """Nothing is projected, and no conflicts are counted."""
    total = combine_flat_grads(matrix, use_pcgrad=False)
    mean = combine_flat_grads(matrix, use_pcgrad=False, weights=[2.0] * len(matrix))
    torch.testing.assert_close(total.vector, matrix.sum(0))
    torch.testing.assert_close(mean.vector, matrix.mean(0))
    assert total.conflicts == 0
    assert not total.projected


def test_half_precision_rows_do_not_overflow() -> None:
    """Values whose squares exceed float16 are merged in wider arithmetic."""
    rows = [torch.full((4,), 3e4, dtype=torch.float16), torch.tensor([-3e4, 3e4, 3e4, 2e4], dtype=torch.float16)]
    assert combine_flat_grads(rows, weights=[1.0, 1.0]).vector.isfinite().all()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_products_are_not_used(precision: str) -> None:
    """With reduced-precision products enabled for training, dot products are computed in float64."""
    rows = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(5))
    exact = rows.double() @ rows.double().T
    assert (gram_matrix(rows) - exact).abs().max() > 1e-6
    torch.set_float32_matmul_precision(precision)
    try:
        assert (gram_matrix(rows) - exact).abs().max() < 1e-6
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (gram_matrix(rows) - exact).abs().max() > 1e-6


@pytest.mark.skipif(torch.__version__ < "2.9", reason="precision cannot be set by backend before torch 2.9")
def test_a_precision_set_by_backend_is_respected() -> None:
    """With a precision set for one backend, dot products are computed in float64."""
    rows = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(5))
    exact = rows.double() @ rows.double().T
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined] # set up at import
    try:
        assert (gram_matrix(rows) - exact).abs().max() < 1e-6
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert (gram_matrix(rows) - exact).abs().max() > 1e-6


def test_autocast_does_not_affect_the_merge() -> None:
    """Inside an autocast region the result has the same bits as outside."""
    rows = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = combine_flat_grads(rows).vector
    assert torch.equal(inside, combine_flat_grads(rows).vector)


@pytest.mark.parametrize(
    ("flats", "message"),
    [
        ([torch.ones(2), torch.ones(2), torch.ones(3)], "gradient 2: 3 elements, but gradient 0 has 2"),
        ([torch.ones(2), torch.ones(2).half()], "gradient 1: dtype torch.float16"),
        ([torch.ones(2), torch.ones(2, device="meta")], "gradient 1: device meta"),
        ([torch.ones(2), torch.ones(2, 1)], "gradient 1: a row has one dimension, not 2"),
        ([torch.ones(2).long()], "gradient 0: dtype torch.int64"),
        (torch.ones(2), "rank 1"),
        (torch.ones(2, 2).long(), "gradient 0: dtype torch.int64"),
    ],
)
def test_mismatched_rows_are_refused(flats: list[Tensor] | Tensor, message: str) -> None:
    """The error names the first row that differs, and the difference."""
    with pytest.raises(GradientMismatchError, match=message):
        combine_flat_grads(flats)


@pytest.mark.parametrize("flats", [[], [torch.zeros(0)], torch.zeros(0, 3), torch.zeros(3, 0)])
@pytest.mark.parametrize("use_pcgrad", [True, False])
def test_no_rows_is_an_error(flats: list[Tensor] | Tensor, use_pcgrad: bool) -> None:
    """Merging no rows raises NoGradientsError."""
    with pytest.raises(NoGradientsError, match=r"^no gradients available for aggregation$"):
        combine_flat_grads(flats, use_pcgrad=use_pcgrad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    """On a device, with TF32 allowed and under autocast, the merge agrees with float64 and stays there."""
    rows = torch.randn(5, 300_001, generator=torch.Generator().manual_seed(2)).to(dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast("cuda"):
            merged = combine_flat_grads(rows.cuda(), generator=step_generator(0, 1))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    expected = reference(list(rows), projection_order(5, step_generator(0, 1)))
    assert merged.vector.device.type == "cuda"
    assert (merged.vector.cpu().double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_on_different_devices_are_refused() -> None:
    """The error names a CPU row among rows on a device."""
    with pytest.raises(GradientMismatchError, match="gradient 1: device cpu"):
        combine_flat_grads([torch.ones(2, device="cuda"), torch.ones(2)])
