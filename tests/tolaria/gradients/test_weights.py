from __future__ import annotations

import math

import pytest

from leyline.v1 import enums_pb2
from leyline.v1.enums_pb2 import SeedLifecycleStage
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from tolaria.errors import GradientWeightError
from tolaria.gradients import SeedWeightResolver, alpha_at
from tolaria.gradients.weights import STAGE_WEIGHTS
from tolaria.values.training import HOST

OPEN_WEIGHTS = {
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
    """A stage that the contract gains must be given a weight on purpose."""
    assert set(STAGE_WEIGHTS) == set(SeedLifecycleStage.values())


@pytest.mark.parametrize(("stage", "weight"), OPEN_WEIGHTS.items())
@pytest.mark.parametrize("isolation", [True, False])
def test_weight_by_stage(stage: str, weight: float, isolation: bool) -> None:
    """The table, and isolation silencing the rows of germinated and training seeds."""
    expected = 0.0 if isolation and stage in {"GERMINATED", "TRAINING"} else weight
    host, source = SeedWeightResolver(isolation=isolation).resolve([seed(stage, metrics={"alpha": 0.25})], 0)
    assert source.weight == expected
    assert source.has_row == (expected > 0)
    assert (host.name, host.weight, host.has_row) == (HOST, 1.0, True)


@pytest.mark.parametrize(("step", "alpha"), [(0, 0.2), (9, 0.2), (10, 0.2), (15, 0.5), (20, 0.8), (10**12, 0.8)])
def test_alpha_is_linear_between_its_ends(step: int, alpha: float) -> None:
    """Constant before, linear during, constant after."""
    schedule = AlphaSchedule(start=0.2, end=0.8, begin_step=10, duration_steps=10)
    assert alpha_at(schedule, step) == pytest.approx(alpha)


def test_alpha_without_duration_jumps() -> None:
    """Nothing is divided by a duration of zero."""
    schedule = AlphaSchedule(start=0.0, end=1.0, begin_step=5)
    assert [alpha_at(schedule, step) for step in (4, 5, 6)] == [0.0, 1.0, 1.0]


def test_schedule_goes_before_metrics() -> None:
    """An older peer's metrics["alpha"] is read only where there is no schedule; without both alpha is 0."""
    schedule = AlphaSchedule(start=0.5, end=0.5)
    states = [
        seed("BLENDING", alpha=schedule, metrics={"alpha": 0.9}),
        seed("BLENDING", metrics={"alpha": 0.75}),
        seed("BLENDING"),
    ]
    assert [source.alpha for source in SeedWeightResolver(isolation=True).resolve(states, 3)[1:]] == [0.5, 0.75, 0.0]


def test_resolving_does_not_write_into_the_message() -> None:
    """Looking for an alpha that is not there does not put one there."""
    state = seed("BLENDING")
    SeedWeightResolver(isolation=True).resolve([state], 0)
    assert state == seed("BLENDING")


def test_alpha_outside_of_its_range_is_cut() -> None:
    """A schedule that overshoots weighs at most 1 and at least 0."""
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
def test_numbers_that_cannot_be_weights_are_refused(fields: dict[str, object], message: str) -> None:
    """The seed is named, with its position."""
    with pytest.raises(GradientWeightError, match=message):
        SeedWeightResolver(isolation=True).resolve([seed("TRAINING"), seed("BLENDING", **fields)], 0)


def test_a_stage_newer_than_the_table_trains_nothing() -> None:
    """A number that this version does not know has no row."""
    state = SeedState(seed_id="s")
    state.stage = 77  # type: ignore[assignment] # proto3 enums are open
    assert SeedWeightResolver(isolation=False).resolve([state], 0)[1].weight == 0
    assert enums_pb2.SEED_STAGE_UNKNOWN == 0
