from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leyline.v1 import enums_pb2
from leyline.v1.enums_pb2 import SeedLifecycleStage
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from tolaria.errors import GradientMismatchError, GradientWeightError, NoGradientsError
from tolaria.gradients import AttributionMode, aggregate_weighted, combine_flat_grads
from tolaria.gradients.weights import STAGE_WEIGHTS, SeedWeightResolver, SourceWeight, TeacherAttributionMixer
from tolaria.values.training import HOST

WEIGHTS = {
    "DORMANT": 0.0,
    "GERMINATED": 0.01,
    "TRAINING": 0.1,
    "BLENDING": 0.25,
    "SHADOWING": 0.5,
    "PROBATIONARY": 1.0,
    "FOSSILIZED": 0.0,
    "CULLED": 0.0,
    "EMBARGOED": 0.0,
    "RESETTING": 0.0,
    "TERMINATED": 0.0,
    "UNKNOWN": 0.0,
}


def seed(stage: str, **fields: object) -> SeedState:
    """A seed `s` in the stage."""
    return SeedState(seed_id="s", stage=SeedLifecycleStage.Value(f"SEED_STAGE_{stage}"), **fields)  # type: ignore[arg-type]


def test_every_stage_of_the_contract_has_a_weight() -> None:
    """A new stage of the contract must be given a weight explicitly."""
    assert set(STAGE_WEIGHTS) == set(SeedLifecycleStage.values())


@pytest.mark.parametrize(("stage", "weight"), WEIGHTS.items())
@pytest.mark.parametrize("isolation", [True, False])
def test_weight_by_stage(stage: str, weight: float, isolation: bool) -> None:
    """The weight is that of the table; isolation removes the rows of germinated and training seeds."""
    expected = 0.0 if isolation and stage in {"GERMINATED", "TRAINING"} else weight
    host, source = SeedWeightResolver(isolation=isolation).resolve([seed(stage, metrics={"alpha": 0.25})], 0)
    assert source.weight == expected
    assert source.has_row == (expected > 0)
    assert (host.name, host.weight, host.has_row) == (HOST, 1.0, True)


def test_the_schedule_takes_precedence_over_metrics() -> None:
    """metrics["alpha"] of an older peer is read only without a schedule; without both alpha is 0."""
    schedule = AlphaSchedule(start=0.5, end=0.5)
    states = [
        seed("BLENDING", alpha=schedule, metrics={"alpha": 0.9}),
        seed("BLENDING", metrics={"alpha": 0.75}),
        seed("BLENDING"),
    ]
    assert [source.alpha for source in SeedWeightResolver(isolation=True).resolve(states, 3)[1:]] == [0.5, 0.75, 0.0]


def test_alpha_follows_the_schedule() -> None:
    """Alpha, and with it the weight, is that of the step."""
    states = [seed("BLENDING", alpha=AlphaSchedule(start=0.25, end=0.75, begin_step=10, duration_steps=4))]
    weights = [SeedWeightResolver(isolation=True).resolve(states, step)[1].weight for step in (9, 10, 12, 14, 10**12)]
    assert weights == [0.25, 0.25, 0.5, 0.75, 0.75]


def test_resolving_does_not_write_into_the_message() -> None:
    """Reading a missing alpha does not insert one."""
    state = seed("BLENDING")
    SeedWeightResolver(isolation=True).resolve([state], 0)
    assert state == seed("BLENDING")


def test_alpha_is_clamped_to_its_range() -> None:
    """An alpha outside 0 to 1 gives a weight of 0 or 1."""
    states = [seed("BLENDING", metrics={"alpha": 1.5}), seed("BLENDING", metrics={"alpha": -0.5})]
    assert [source.weight for source in SeedWeightResolver(isolation=True).resolve(states, 0)[1:]] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": {"alpha": math.nan}}, r"weight 1: alpha nan \(of s\)"),
        ({"attribution": math.inf}, r"weight 1: inf \(of attribution of s\) is not finite"),
        ({"attribution": -0.5}, r"weight 1: -0.5 \(of attribution of s\) is negative"),
    ],
)
def test_invalid_alphas_and_attributions_are_refused(fields: dict[str, object], message: str) -> None:
    """The error names the seed and its position."""
    with pytest.raises(GradientWeightError, match=message):
        SeedWeightResolver(isolation=True).resolve([seed("TRAINING"), seed("BLENDING", **fields)], 0)


def test_an_unknown_stage_has_no_row() -> None:
    """A stage number that this version does not know has weight 0."""
    state = SeedState(seed_id="s")
    state.stage = 77  # type: ignore[assignment] # proto3 enums are open
    assert SeedWeightResolver(isolation=False).resolve([state], 0)[1].weight == 0
    assert enums_pb2.SEED_STAGE_UNKNOWN == 0


def source(name: str, attribution: float = 0.0) -> SourceWeight:
    """A source with a row."""
    return SourceWeight(name, enums_pb2.SEED_STAGE_PROBATIONARY, 1.0, 1.0, attribution)


SOURCES = (source(HOST, 9.0), source("s", 0.25), source("t", 0.5))


@pytest.mark.parametrize(
    ("mode", "shares"),
    [
        (AttributionMode.OFF, (0.0, 0.0, 0.0)),
        (AttributionMode.KASMINA, (0.0, 0.25, 0.5)),
        (AttributionMode.DATALOADER, (0.0, 0.75, 0.0)),
    ],
)
def test_shares_by_mode(mode: AttributionMode, shares: tuple[float, ...]) -> None:
    """Kasmina takes the state's attribution, dataloader the fraction of the samples; the host gets none."""
    assert TeacherAttributionMixer(mode).shares(SOURCES, {"s": 6, HOST: 2}) == shares


def test_shares_above_one_are_scaled_down() -> None:
    """Shares that add up to more than 1 are divided by their sum."""
    mixer = TeacherAttributionMixer(AttributionMode.KASMINA)
    assert mixer.shares([source(HOST), source("s", 3.0), source("t", 1.0)], {}) == (0.0, 0.75, 0.25)


def test_without_a_host_nothing_is_shared() -> None:
    """A step without a row of the host has no teacher."""
    assert TeacherAttributionMixer(AttributionMode.KASMINA).shares(SOURCES[1:], {}) == (0.0, 0.0)
    assert TeacherAttributionMixer.teacher_shares(["s"], torch.ones(1), [0.0]).tolist() == [0.0]


@given(first=st.floats(0, 0.5), second=st.floats(0, 0.5), weight=st.floats(0, 1))
def test_mixing_keeps_the_weighted_sum(first: float, second: float, weight: float) -> None:
    """Attribution does not change the weighted sum of all rows; of full weight, not the sum either."""
    rows = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
    weights = torch.tensor([1.0, weight, 1.0], dtype=torch.float64)
    mixed = TeacherAttributionMixer.mixing([HOST, "s", "t"], [0.0, first, second], weights.tolist()) @ rows
    torch.testing.assert_close(weights @ mixed, weights @ rows)
    torch.testing.assert_close(mixed[1], rows[1] + first * rows[0])
    torch.testing.assert_close(mixed[0], (1 - weight * first - second) * rows[0])


def test_teacher_shares_are_fractions_of_norms() -> None:
    """A seed of norm 1 with a quarter of a teacher of norm 4 is half the teacher's; the host is 4 of 6."""
    shares = TeacherAttributionMixer.teacher_shares([HOST, "s", "t"], torch.tensor([4.0, 1.0, 1.0]), [0.0, 0.25, 0.0])
    torch.testing.assert_close(shares, torch.tensor([4 / 6, 0.5, 0.0]))


def test_zero_rows_have_no_teacher() -> None:
    """A norm of zero does not divide by zero."""
    shares = TeacherAttributionMixer.teacher_shares([HOST, "s"], torch.zeros(2), [0.0, 0.5])
    assert shares.tolist() == [0.0, 0.0]


BAD_WEIGHTS = [
    ([1.0, math.nan], 1, "weight 1: nan is not finite"),
    ([math.inf, 1.0], 0, "weight 0: inf is not finite"),
    ([1.0, -0.5], 1, "weight 1: -0.5 is negative"),
    ([0.0, 0.0], None, "their sum is 0"),
    ([1e308, 1e308], None, "their sum is inf"),
    ([1.0], None, "1 given for 2"),
    ([], None, "0 given for 2"),
]


@given(
    shape=st.lists(st.integers(1, 3), max_size=4).map(tuple),
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=5).filter(lambda weights: sum(weights) > 1e-3),
)
def test_weights_apply_to_tensors_of_any_rank(shape: tuple[int, ...], weights: list[float]) -> None:
    """Each weight applies to a whole tensor, from scalars to rank four, given as a list or stacked."""
    tensors = [
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(len(weights))
    ]
    expected = sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True)) / sum(weights)
    for given_tensors in (tensors, torch.stack(tensors)):
        merged = aggregate_weighted(given_tensors, weights)
        torch.testing.assert_close(merged, torch.as_tensor(expected))
        assert merged.shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_mean_has_the_dtype_of_the_tensors(dtype: torch.dtype) -> None:
    """Every real dtype is kept."""
    merged = aggregate_weighted([torch.tensor(1.0, dtype=dtype), torch.tensor(4.0, dtype=dtype)], torch.tensor([1, 2]))
    assert merged.dtype == dtype
    assert merged.item() == pytest.approx(3.0, rel=1e-2)


def test_half_precision_is_summed_in_float32() -> None:
    """Thousands of half-precision rows do not lose small terms to rounding."""
    rows = [torch.ones(1, dtype=torch.float16)] * 4001
    assert aggregate_weighted(rows, [1.0] * 4001).item() == 1.0


@pytest.mark.parametrize(("weights", "index", "message"), BAD_WEIGHTS)
@pytest.mark.parametrize("use_pcgrad", [True, False, None])
def test_invalid_weights_are_refused(
    weights: list[float], index: int | None, message: str, use_pcgrad: bool | None
) -> None:
    """NaN, infinite, negative, all zero or too few weights raise an error with the index in every merge."""
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
    """The error names the first tensor that differs."""
    with pytest.raises(GradientMismatchError, match=message):
        aggregate_weighted(tensors, [1.0] * len(tensors))


def test_no_tensors_is_an_error() -> None:
    """The mean of nothing raises NoGradientsError."""
    with pytest.raises(NoGradientsError):
        aggregate_weighted([], [])
