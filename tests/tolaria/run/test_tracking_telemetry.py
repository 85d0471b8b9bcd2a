"""What a run records of itself, in the order of its events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from leyline.v1.admin_service_pb2 import RunState
from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_FOSSILIZED
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from leyline.v1.state_pb2 import HardwareContext
from tolaria.config import Settings
from tolaria.lane.messages import EpochDone, LaneLost, Restored, SeedsChanged, StepDone
from tolaria.run.status import RunStatus
from tolaria.run.tracking_telemetry import TrackingTelemetry, changed_settings
from tolaria.trackers.tracker import Note, Point, Record, Rewind, RunEnd
from tolaria.values.evaluation import Evaluation
from tolaria.values.training import EpochProgress, Position

STEP = StepDone(1, 1, 0.5, 2.0, 8, 0.1, 0.0, 0.0, learning_rate=0.01)


class Recorded:
    """A run whose records are kept."""

    def __init__(self, every_steps: int = 1) -> None:
        self.records: list[Record] = []
        self.status = RunStatus("run", "digits", "try", epochs=3, started_at_s=0.0)
        given = Settings.model_validate({"tracking": {"every_steps": every_steps}})
        self.telemetry = TrackingTelemetry(cast("Any", self), self.status, given, clock=lambda: 7.0)

    def put(self, record: Record) -> None:
        self.records.append(record)

    def step(self, number: int, **changes: Any) -> None:
        """A step has been taken."""
        self.status.global_step = number
        self.telemetry.on_step(replace(STEP, global_step=number, **changes))

    def rewind(self, step: int) -> None:
        """The lane has restored a state; the attempt is counted after the observers have been told."""
        progress = EpochProgress(1, over=False)
        restored = Restored(Position(step, 1), "", "", 0.0, progress, (), {}, ())
        self.status.global_step = step
        self.telemetry.on_rewind(restored)
        self.status.attempt += 1

    @property
    def steps(self) -> list[int]:
        """The steps of all points."""
        return [record.global_step for record in self.records if isinstance(record, Point)]


def test_points_are_as_frequent_as_the_settings_say() -> None:
    """The loss, the norm and the rate of that step; what was logged since the last point."""
    run = Recorded(every_steps=3)
    run.step(1, logged={"size": 1.0})
    run.step(2, logged={"size": 2.0, "other": 5.0})
    run.step(3)
    run.step(4, logged={"size": 4.0})
    for number in (5, 6):
        run.step(number)
    values = {"train/loss": 0.5, "train/gradient_norm": 2.0, "train/learning_rate": 0.01}
    assert run.records == [
        Point(3, 1, 1, 7.0, values | {"train/size": 2.0, "train/other": 5.0}),
        Point(6, 1, 1, 7.0, values | {"train/size": 4.0}),
    ]


def test_skipped_steps_are_no_points() -> None:
    """They do not change the step, and their losses may be no numbers."""
    run = Recorded()
    run.step(0, skipped=True, loss=float("nan"))
    assert run.records == []


def test_an_evaluation_is_a_point() -> None:
    """With all its figures, the rates of all groups, and the seeds."""
    run = Recorded(every_steps=100)
    ramp = AlphaSchedule(start=0.0, end=1.0, begin_step=0, duration_steps=20)
    run.status.grafted = [
        SeedState(seed_id="a", stage=SEED_STAGE_BLENDING, alpha=ramp),
        SeedState(seed_id="b", stage=SEED_STAGE_FOSSILIZED),
    ]
    evaluation = Evaluation(4.0, 6, 8, {"f1": 0.25})
    epoch = EpochDone(
        1, 10, evaluation, 1.0, 0.0, {"host": 0.1, "seed:a": 0.01}, 0.0, HardwareContext(), training_loss=0.75
    )
    run.telemetry.on_epoch(epoch, show_layers=True)
    (point,) = run.records
    assert isinstance(point, Point)
    assert (point.global_step, point.attempt, point.epoch) == (10, 1, 1)
    assert point.values == {
        "train/epoch_loss": 0.75, "validation/loss": 0.5, "validation/accuracy": 0.75, "validation/f1": 0.25,
        "lr/host": 0.1, "lr/seed:a": 0.01, "seeds/active": 1.0, "seeds/fossilized": 1.0, "seeds/a/alpha": 0.5,
    }  # fmt: skip


def test_an_epoch_without_evaluation_has_no_figures_of_one() -> None:
    """A job may have no validation data."""
    run = Recorded()
    run.telemetry.on_epoch(EpochDone(1, 10, Evaluation(0.0), 1.0, 0.0, {}, 0.0, HardwareContext()), show_layers=True)
    (point,) = run.records
    assert isinstance(point, Point)
    assert not [name for name in point.values if name.startswith("validation/")]


@pytest.mark.parametrize("first", ["point", "note", "frame"])
def test_a_rewind_precedes_what_follows_it(first: str) -> None:
    """With the number of the attempt that begins, whatever is recorded next."""
    run = Recorded()
    run.step(8)
    run.rewind(5)
    if first == "note":
        run.telemetry.on_lane_lost(LaneLost(1, "killed", "SIGKILL"), 5)
    elif first == "frame":
        run.telemetry.on_frame(run.status)
    run.step(6)
    assert run.records[1] == Rewind(5, 2, 7.0)
    assert [record.attempt for record in run.records] == [1, *[2] * (len(run.records) - 1)]
    assert run.steps == [8, 6]


def test_events_are_notes() -> None:
    """As sentences, at their step."""
    run = Recorded()
    run.step(3)
    run.telemetry.on_explosion(replace(STEP, global_step=3), "far above all others")
    run.telemetry.on_seeds_changed(SeedsChanged(3, (), ("a grafted into middle", "b removed")))
    run.telemetry.on_state(RunState.RUN_STATE_PAUSED, "operator")
    assert [(record.global_step, record.text) for record in run.records if isinstance(record, Note)] == [
        (3, "loss explosion: far above all others"), (3, "seeds: a grafted into middle"), (3, "seeds: b removed"),
        (3, "paused: operator"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("states", "outcomes"),
    [
        (["RUNNING", "FINISHED"], ["finished"]),
        (["RUNNING", "FAILED"], ["failed"]),
        (["RUNNING", "DRAINING", "FINISHED"], []),  # it may be resumed
        (["FINISHED", "DRAINING", "FINISHED"], ["finished"]),
    ],
)
def test_only_the_run_has_an_end(states: list[str], outcomes: list[str]) -> None:
    """Not the process that is drained."""
    run = Recorded()
    for state in states:
        run.telemetry.on_state(RunState.Value(f"RUN_STATE_{state}"), "")
    assert [record.outcome for record in run.records if isinstance(record, RunEnd)] == outcomes


def test_settings_that_differ_are_recorded_without_secrets() -> None:
    """By their dotted names, as JSON values."""
    given = Settings.model_validate(
        {"training": {"epochs": 7, "tags": {"a": "b"}}, "leyline": {"secret": "0123456789abcdef0123456789abcdef"}}
    )
    assert changed_settings(given) == {"training.epochs": 7, "training.tags": {"a": "b"}}
