from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from support.checkpointing import epoch_done
from tolaria.config import CheckpointSettings
from tolaria.run.missing_metrics import MissingMetrics
from tolaria.run.observers import RunObserver
from tolaria.values.evaluation import Evaluation

EARLY = "early_stopping.metric"


class Recorder(RunObserver):
    """Records what is reported."""

    def __init__(self) -> None:
        self.reported: list[tuple[str, str, list[str]]] = []

    def on_metric_missing(self, setting: str, metric: str, known: Sequence[str]) -> None:
        self.reported.append((setting, metric, list(known)))


@pytest.fixture
def recorder() -> Recorder:
    """Reported metrics."""
    return Recorder()


def test_a_metric_that_does_not_occur_is_reported_once_and_named_as_long_as_it_does_not(recorder: Recorder) -> None:
    """With the setting and the metrics that there are."""
    metrics = MissingMetrics(recorder)
    for step in (1, 2, 3):
        metrics.epoch(replace(epoch_done(step), missing_metrics={EARLY: "f1"}), CheckpointSettings(), {})
        assert metrics.sentences == ("early_stopping.metric is f1, which has not occurred; there are accuracy, loss",)
    assert recorder.reported == [(EARLY, "f1", ["accuracy", "loss"])]


def test_a_metric_that_comes_every_few_epochs_is_not_missing_any_more(recorder: Recorder) -> None:
    """Nor when an evaluation after that lacks it."""
    metrics = MissingMetrics(recorder)
    without = replace(epoch_done(1), missing_metrics={EARLY: "f1"})
    metrics.epoch(without, CheckpointSettings(), {})
    metrics.epoch(replace(epoch_done(2), evaluation=Evaluation(1.0, 1, 1, {"f1": 0.5})), CheckpointSettings(), {})
    assert metrics.sentences == ()
    metrics.epoch(without, CheckpointSettings(), {})
    assert metrics.sentences == ()
    assert len(recorder.reported) == 1


@pytest.mark.parametrize(
    ("best", "missing"),
    [
        ("accuracy", None),
        ("loss", None),
        ("f1:max", "there are accuracy, loss"),
        ("training/mean:max", None),
        ("training/loss:min", None),
        ("training/other:max", "there are training/loss, training/mean"),
    ],
)
def test_the_metric_of_the_best_checkpoint_is_compared_with_those_that_it_can_be(
    recorder: Recorder, best: str, missing: str | None
) -> None:
    """Those of evaluations, or those that the job logs."""
    metrics = MissingMetrics(recorder)
    metrics.epoch(epoch_done(1), CheckpointSettings(best=best), {"mean": 7.0})
    name = best.rpartition(":")[0]
    expected = () if missing is None else (f"checkpoint.best is {name}, which has not occurred; {missing}",)
    assert metrics.sentences == expected
    assert len(recorder.reported) == len(expected)


def test_a_job_that_counts_no_accuracy_lacks_nothing_by_default(recorder: Recorder) -> None:
    """Its best checkpoint is that with the lowest loss."""
    metrics = MissingMetrics(recorder)
    metrics.epoch(replace(epoch_done(1), evaluation=Evaluation(1.0, None, 1)), CheckpointSettings(), {})
    assert recorder.reported == []


def test_without_any_evaluation_that_is_said(recorder: Recorder) -> None:
    """Early stopping then waits for ever."""
    metrics = MissingMetrics(recorder)
    unevaluated = replace(epoch_done(1), evaluation=Evaluation(0.0), missing_metrics={EARLY: "loss"})
    metrics.epoch(unevaluated, CheckpointSettings(), {})
    assert metrics.sentences == ("early_stopping.metric is loss, which has not occurred; nothing is evaluated",)
