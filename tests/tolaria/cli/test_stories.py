from __future__ import annotations

import math

import pytest

from leyline.v1.admin_service_pb2 import GetStatusResponse
from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING as BLENDING
from leyline.v1.enums_pb2 import SEED_STAGE_CULLED as CULLED
from leyline.v1.enums_pb2 import SEED_STAGE_DORMANT as DORMANT
from leyline.v1.enums_pb2 import SEED_STAGE_FOSSILIZED as FOSSILIZED
from leyline.v1.enums_pb2 import SEED_STAGE_GERMINATED as GERMINATED
from leyline.v1.enums_pb2 import SEED_STAGE_PROBATIONARY as PROBATIONARY
from leyline.v1.enums_pb2 import SEED_STAGE_SHADOWING as SHADOWING
from leyline.v1.enums_pb2 import SEED_STAGE_TRAINING as TRAINING
from leyline.v1.seeds_pb2 import SeedState
from tolaria.cli.stories import Stories, Story, story_line

Shown = tuple[int, float]


def told(*shown: Shown) -> Story:
    """The story of seed `s` after epochs 1, 2, ... that each showed a stage and an accuracy."""
    stories = Stories()
    for epoch, (stage, accuracy) in enumerate(shown, 1):
        seed = SeedState(seed_id="s", stage=stage, blueprint_id="lora")  # type: ignore[arg-type]
        stories.see(GetStatusResponse(epoch=epoch, validation_accuracy=accuracy, seeds=[seed]))
    story = stories.of("s")
    assert [story] == stories.all()
    assert story is not None
    return story


@pytest.mark.parametrize(
    ("shown", "line"),
    [
        (
            [
                (GERMINATED, 0.8),
                (TRAINING, 0.9),
                (BLENDING, 0.7),
                (PROBATIONARY, 0.91),
                (FOSSILIZED, 0.95),
                (FOSSILIZED, 0.99),
            ],
            "s lora: epoch 1 germinated, 5 fossilized; accuracy 90.00% before it blended, 95.00% after",
        ),
        (
            [
                (TRAINING, 0.9),
                (BLENDING, 0.5),
                (CULLED, 0.4),
                (DORMANT, 0.9),
            ],
            "s lora: epoch 1 germinated, 3 culled; accuracy 90.00% before it blended, 40.00% when it was culled",
        ),
        (
            [(TRAINING, 0.9), (CULLED, 0.9)],
            "s lora: epoch 1 germinated, 2 culled; it did not blend",
        ),
        ([(TRAINING, 0.9)], "s lora: epoch 1 germinated, training at the end; it did not blend"),
        (
            [(GERMINATED, 0.0), (BLENDING, 0.5), (SHADOWING, 0.6)],
            "s lora: epoch 1 germinated, shadowing at the end; accuracy unknown before it blended, 60.00% at the end",
        ),
        (
            [(FOSSILIZED, 0.9)],
            "s lora: germinated unseen, 1 fossilized; accuracy unknown before it blended, 90.00% after",
        ),
        (
            [
                (TRAINING, 0.8),
                (BLENDING, 0.9),
                (FOSSILIZED, 0.9),
                (TRAINING, 0.7),
            ],
            "s lora: epoch 1 germinated, training at the end; it did not blend",
        ),
        (
            [(TRAINING, 0.8), (DORMANT, 0.9), (GERMINATED, 0.7)],
            "s lora: epoch 3 germinated, germinated at the end; it did not blend",
        ),
    ],
)
def test_a_seed_s_life_is_one_line(shown: list[Shown], line: str) -> None:
    """When it came, what became of it, what it brought; a rollback takes back, another life begins anew."""
    assert story_line(told(*shown)) == line


def test_an_accuracy_that_is_no_number_is_unknown() -> None:
    """Neither a run without a validation nor NaN is a measurement."""
    assert told((TRAINING, math.nan)).accuracy_before is None
    assert told((TRAINING, 0.0)).accuracy_before is None


def test_names_cannot_act_on_a_terminal() -> None:
    """A peer's words are shown tame."""
    assert story_line(Story("s\x1b[2J", "b", TRAINING)).startswith("s [2J b: ")
