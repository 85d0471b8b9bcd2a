from __future__ import annotations

import math

import pytest

from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState
from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_GERMINATED
from leyline.v1.seeds_pb2 import SeedState
from tolaria.cli.curves import MARKS, WIDTH_MAX, RunCurves, chart


@pytest.mark.parametrize(
    ("values", "height", "expected"),
    [
        ([0.0, 0.5, 1.0], 1, ["▁▅█"]),
        ([0.0, 1.0], 2, [" █", "▁█"]),
        ([2.0, -1.0], 1, ["█▁"]),
        ([math.nan, 1.0], 1, [" █"]),
    ],
)
def test_a_chart_has_a_column_for_each_value(values: list[float], height: int, expected: list[str]) -> None:
    """Heights are eighths of a line; values beyond the limits are cut, and those that are not finite are gaps."""
    assert chart(values, 0.0, 1.0, height) == expected


def test_a_constant_curve_is_drawn() -> None:
    """Equal limits do not divide by zero."""
    assert chart([0.3, 0.3], 0.3, 0.3, 1) == ["██"]


@pytest.mark.parametrize("count", [WIDTH_MAX, WIDTH_MAX + 1, 1000])
def test_long_runs_fit(count: int) -> None:
    """Neighbours share a column, and the last value is the last column."""
    (line,) = chart([*([0.0] * (count - 1)), 1.0], 0.0, 1.0, 1)
    assert len(line) == WIDTH_MAX
    assert line == "▁" * (WIDTH_MAX - 1) + "█"


def status(epoch: int, accuracy: float, **fields: int) -> GetStatusResponse:
    """A status at the beginning of the epoch after `epoch`."""
    return GetStatusResponse(
        epoch=epoch + 1,
        training_loss=1 / epoch,
        validation_accuracy=accuracy,
        state=RunState.RUN_STATE_RUNNING,
        rollbacks=fields.get("rollbacks", 0),
        skipped_steps=fields.get("skipped", 0),
        seeds=[SeedState(seed_id="s", stage=fields["stage"])] if "stage" in fields else [],  # type: ignore[arg-type]
    )


def test_curves_show_what_happened_when() -> None:
    """Each finished epoch is a point; an epoch repeated after a rollback is another; marks are below their epochs."""
    curves = RunCurves()
    curves.update(GetStatusResponse(epoch=1, state=RunState.RUN_STATE_RUNNING))
    assert curves.lines() == []
    for each in [
        status(1, 0.5),
        status(1, 0.5),
        status(2, 0.6, stage=SEED_STAGE_GERMINATED),
        status(3, 0.7, stage=SEED_STAGE_BLENDING),
        status(2, 0.6, rollbacks=1, stage=SEED_STAGE_BLENDING),
        status(3, 0.8, rollbacks=1, stage=SEED_STAGE_BLENDING, skipped=2),
    ]:
        curves.update(each)
    assert [(point.epoch, point.accuracy, point.marks) for point in curves.points] == [
        (1, 0.5, ""),
        (2, 0.6, "g"),
        (3, 0.7, "b"),
        (2, 0.6, "R"),
        (3, 0.8, "s"),
    ]
    other = RunCurves()
    for each in [status(1, 0.4), status(2, 0.45)]:
        other.update(each)
    lines = curves.lines(other)
    assert lines[-1] == MARKS
    (marks,) = [line for line in lines if line.split() == ["gbRs"]]
    accuracy = next(line for line in lines if line.startswith("accuracy"))
    assert marks.index("g") - 1 == accuracy.index("80.0%") + len("80.0%  ")
    assert sum("40.0%" in line for line in lines) == 2  # the lowest of both runs is the scale of both
    assert [line for line in lines if line.endswith(" 45.0%")]


def test_the_end_of_a_run_is_a_point() -> None:
    """The figures of the last epoch are final when the run has finished."""
    curves = RunCurves()
    curves.update(GetStatusResponse(epoch=2, validation_accuracy=0.5, state=RunState.RUN_STATE_FINISHED))
    assert [point.epoch for point in curves.points] == [2]
