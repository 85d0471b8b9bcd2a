"""Early stopping: which evaluation ends a run, and what a rollback and a resumption make of it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from support.lane_driver import built, running
from tolaria.config import EarlyStoppingSettings, Settings
from tolaria.lane.build import BuiltLane
from tolaria.lane.early_stopping import EarlyStopping
from tolaria.lane.messages import CaptureImage, EpochDone, ImageCaptured, Restore, Restored, RunEpoch

JOB = "support.practice_jobs:Scored"
NAN = math.nan


def stopping(**fields: Any) -> EarlyStoppingSettings:
    """Settings of the metric `score`."""
    return EarlyStoppingSettings.model_validate({"metric": "score", "mode": "max", **fields})


def lane_of(scores: list[float | None], **fields: Any) -> BuiltLane:
    """A lane whose evaluations have these scores."""
    return built(JOB, deterministic=True, options={"scores": scores}, sections={"early_stopping": stopping(**fields)})


@pytest.mark.parametrize(
    ("fields", "scores", "ends_at"),
    [
        ({"patience": 2}, [1, 2, 2, 2], 4),
        ({"patience": 2}, [1, 2, 1, 3, 1, 1], 6),
        ({"patience": 3}, [1, 2, 2, 2], None),
        ({"patience": 1, "min_delta": 0.5}, [1, 1.5], 2),
        ({"patience": 1, "min_delta": 0.5}, [1, 1.6, 2.2], None),
        ({"patience": 2, "mode": "min"}, [3, 2, 2, 1, 1, 2], 6),
        ({"patience": 2}, [1, None, 1, None, 1], 5),
        ({"patience": 2}, [NAN, NAN], 2),
        ({"patience": 2}, [NAN, 1, 2, NAN, 3], None),
        ({"patience": 1, "metric": ""}, [1, 1, 1], None),
    ],
)
def test_the_evaluation_that_ends_the_run(
    fields: dict[str, Any], scores: list[float | None], ends_at: int | None
) -> None:
    """The first of `patience` in a row that are not better by more than `min_delta`."""
    rule = EarlyStopping(stopping(**fields))
    reasons = [
        rule.evaluated({} if score is None else {"score": score}, 10 * number) for number, score in enumerate(scores, 1)
    ]
    assert next((number for number, reason in enumerate(reasons, 1) if reason), None) == ends_at


def test_the_reason_names_the_best() -> None:
    """With its step."""
    rule = EarlyStopping(stopping(patience=1))
    rule.evaluated({"score": 0.75}, 80)
    assert rule.evaluated({"score": 0.5}, 160) == (
        "stopped early: score was 0.75 at step 80, and not better in the 1 evaluations since"
    )


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"metric": "f1"}, "early_stopping.metric is f1, which needs early_stopping.mode = min or max"),
        ({"metric": "accuracy", "mode": "min"}, "by which the worst accuracy is the best"),
        ({"metric": "ema/loss", "mode": "max"}, "by which the worst ema/loss is the best"),
    ],
)
def test_a_direction_that_cannot_be_meant_is_refused(setting: dict[str, str], words: str) -> None:
    """Rather than to end a run at its best."""
    with pytest.raises(ValueError, match=words):
        Settings.model_validate({"early_stopping": setting})


@pytest.mark.parametrize(("metric", "highest"), [("loss", False), ("ema/loss", False), ("ema/accuracy", True)])
def test_loss_and_accuracy_have_a_direction(metric: str, highest: bool) -> None:
    """Also those of the average of the weights."""
    assert EarlyStoppingSettings(metric=metric).highest_is_best is highest


def test_a_rollback_undoes_the_count_and_the_end() -> None:
    """The run stops at the same epoch again; in between nothing is left of the first time."""
    with running(lane_of([1, 2, 2, 2], patience=2)) as run:
        run.send(RunEpoch(1))
        run.send(RunEpoch(2))
        run.wait_for(EpochDone, number=2)
        captured = run.done(run.send(CaptureImage(beside=True))).result
        assert isinstance(captured, ImageCaptured)
        image = run.lane.images.take(captured.image_id)
        for turn in (1, 2):
            run.send(RunEpoch(3))
            run.send(RunEpoch(4))
            third, fourth = (run.wait_for(EpochDone, number=2 * turn + place) for place in (1, 2))
            assert (third.stop, "score was 2 at step 16" in fourth.stop) == ("", True)
            assert run.module.progress.stop == fourth.stop
            if turn == 1:
                restored = run.done(run.send(Restore(0, math.inf, run.lane.images.put(image)))).result
                assert isinstance(restored, Restored)
                assert restored.progress.stop == ""
                assert restored.state_digest == restored.expected_digest


@pytest.mark.parametrize(("metric", "known"), [("", False), ("score", True)])
def test_only_a_run_with_early_stopping_has_its_part(metric: str, known: bool) -> None:
    """Versions without it restore the states of the others."""
    state = lane_of([1], metric=metric).snapshots.state
    assert ("early_stopping" in state.parts) is known


@pytest.mark.parametrize(("fields", "stops"), [({}, True), ({"patience": 3}, False), ({"metric": ""}, False)])
def test_a_run_that_was_stopped_stays_so_until_there_is_more_patience(fields: dict[str, Any], stops: bool) -> None:
    """Another process of the same settings has nothing to do; with others it goes on."""
    with running(lane_of([1, 1, 1], patience=2)) as run:
        for number in (1, 2, 3):
            run.send(RunEpoch(number))
        assert run.wait_for(EpochDone, number=3).stop
        captured = run.done(run.send(CaptureImage(beside=True))).result
        assert isinstance(captured, ImageCaptured)
        with run.lane.images.take(captured.image_id) as image:
            later = lane_of([1, 1, 1], **{"patience": 2, **fields})
            restored = later.resume(image)
    assert restored.state_digest == restored.expected_digest
    assert bool(later.ready.progress.stop) is stops


def test_a_metric_that_has_occurred_in_an_earlier_process_is_not_missing() -> None:
    """Some jobs compute it every few epochs; the state knows the best one, unless the settings name another now."""
    before, after = EarlyStopping(stopping()), EarlyStopping(stopping())
    assert before.missing({"loss": 1.0}) == {"early_stopping.metric": "score"}
    before.evaluated({"loss": 1.0, "score": 0.5}, 3)
    after.load_state_dict(before.state_dict())
    assert after.missing({"loss": 1.0}) == {}
    other = EarlyStopping(stopping(metric="f1"))
    other.load_state_dict(before.state_dict())
    assert other.missing({"loss": 1.0}) == {"early_stopping.metric": "f1"}
