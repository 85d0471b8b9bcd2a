from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from leyline.v1.state_pb2 import HardwareContext
from support.lane_driver import built, new_module
from support.runs import FakePeers, new_run, running
from tolaria.cli.render import epoch_line, status_rows
from tolaria.config import HealthSettings, RollbackSettings, Settings, load_settings
from tolaria.errors import BrokenJobError, ConfigurationError
from tolaria.journal.rows import CheckpointRow
from tolaria.lane.messages import EpochDone
from tolaria.lane.step import train_step
from tolaria.run.health import Health
from tolaria.run.verdicts import Proceed, Retreat
from tolaria.values.evaluation import Evaluation

JOB = "support.metric_jobs:MetricsJob"


@pytest.mark.anyio
async def test_metrics_of_a_job_are_shown_everywhere(tmp_path: Path) -> None:
    """In status, the line of an epoch, /metrics and packets; a job that counts no accuracy shows none."""
    sections: dict[str, object] = {"checkpoint": {"best": "ppl:min"}, "state": {"dir": str(tmp_path / "state")}}
    peers = FakePeers()
    run = new_run(peers, job=JOB, sections=sections, epochs=3, accumulate=2)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
        status = run.run.status()
        assert status.validation_metrics.keys() == {"loss", "ppl", "mae"}
        assert status.validation_metrics["ppl"] == pytest.approx(math.exp(status.validation_loss))
        assert dict(status.logged) == {"size": 2.0, "batch.samples": 8.0}
        shown = dict(status_rows(status))
        assert f"ppl {status.validation_metrics['ppl']:.5g}" in shown["learned"]
        assert "accuracy" not in shown["learned"]
        assert shown["logged"] == "batch.samples 8, size 2"
        assert "mae" in epoch_line(status, 3)
        for name in ("ppl", "mae", "loss"):
            value = run.sample("tolaria.validation.metric", {"name": name})
            assert value == pytest.approx(status.validation_metrics[name])
        assert run.sample("tolaria.validation.metric", {"name": "accuracy"}) is None
        assert run.sample("tolaria.training.metric", {"name": "size"}) == 2.0
        assert peers.states[-1].training_metrics["validation.mae"] == pytest.approx(status.validation_metrics["mae"])
        assert peers.states[-1].validation_accuracy == 0.0
        rows = await anyio.to_thread.run_sync(run.storage.checkpoints.restore_points)
        rated = [row for row in rows if row.metric is not None]
        assert {row.metric for row in rated} >= {status.validation_metrics["ppl"]}


@pytest.mark.anyio
@pytest.mark.parametrize(("best", "kept"), [("ppl:min", min), ("ppl:max", max), ("accuracy", None), ("f1:max", None)])
async def test_the_best_checkpoint_is_that_of_the_chosen_metric(tmp_path: Path, best: str, kept: object) -> None:
    """It is kept beside the newest; a job without accuracy has the one with the lowest loss.

    An unknown metric has none, which is said once and in the status, as is that of early stopping.
    """
    settings: dict[str, object] = {"best": best, "keep_last": 1}
    sections: dict[str, object] = {"checkpoint": settings, "state": {"dir": str(tmp_path / "state")}}
    if best == "f1:max":
        sections["early_stopping"] = {"metric": "f2", "mode": "max", "patience": 1}
    run = new_run(FakePeers(), job=JOB, sections=sections, epochs=4)
    found: list[float] = []
    with capture_logs() as logs:
        async with running(run):
            await run.until(lambda: run.state == "FINISHED")
            rows = await anyio.to_thread.run_sync(partial(run.storage.journal.rows, CheckpointRow))
            found = [row.metric for row in rows if row.metric is not None]
            left = [row.metric for row in rows if row.state == "committed"]
            summary = run.run.status().health.summary
    if best == "f1:max":
        assert found == []
        said = [line for line in logs if line["event"] == "tolaria.metric_missing"]
        assert [(line["setting"], line["known"]) for line in said] == [
            ("early_stopping.metric", "loss, mae, ppl"), ("checkpoint.best", "loss, mae, ppl"),
        ]  # fmt: skip
        assert "early_stopping.metric is f2, which has not occurred; there are loss, mae, ppl" in summary
    elif kept is None:
        assert all(metric < 0 for metric in found)
        assert max(found) in left
    else:
        assert kept(found) in left  # type: ignore[operator]


@pytest.mark.parametrize("best", ["perplexity", "perplexity:lowest", "a b:min", ":min", "loss:max:min"])
def test_what_is_no_metric_with_a_direction_is_refused(best: str) -> None:
    """`checkpoint.best` is named in the message."""
    with pytest.raises(ConfigurationError, match=r"checkpoint\.best"):
        load_settings(overrides=[f"checkpoint.best={best}"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("list", "must be a mapping of names to numbers, got a list"),
        ("name", "'a b' is not a name"),
        ("reserved", "'loss' is the name of a figure"),
        ("text", r"metrics\['f1'\] must be a number or a Ratio of numbers, got 'high'"),
        ("tensor", r"metrics\['f1'\] must be a number or a Ratio of numbers, got a tensor of shape \(2,\)"),
        ("ratio", r"metrics\['f1'\] must be a number or a Ratio of numbers, got a tensor of shape \(2,\)"),
        ("many", "has 65 names; at most 64"),
    ],
)
def test_wrong_metrics_are_found_before_the_run(wrong: str, message: str) -> None:
    """By the first look, with the name of the metric."""
    with pytest.raises(BrokenJobError, match=message):
        built("support.metric_jobs:WrongMetricsJob", options={"wrong": wrong})


@pytest.mark.parametrize("name", ["a b", "loss"])
def test_a_wrong_name_in_a_step_is_found_before_the_run(name: str) -> None:
    """`context.log` says what is wrong with it."""
    with pytest.raises(BrokenJobError, match=r"context\.log\(\)"):
        built(JOB, options={"logs": name})


def test_what_a_skipped_step_logs_is_dropped() -> None:
    """It changes nothing; the step after it logs its own."""
    module = new_module(JOB, options={"poison_from": 2, "poison_steps": 1}, accumulate=1)
    steps = [train_step(module, lambda: True) for _ in range(3)]
    assert [(step.skipped, sorted(step.logged)) for step in steps if step is not None] == [
        (False, ["batch.samples", "size"]), (True, []), (False, ["batch.samples", "size"]),
    ]  # fmt: skip


def evaluated(health: Health, values: Sequence[float | None], *, correct: int = 50) -> list[object]:
    """Judges evaluations whose metric has these values, one by one."""
    found = [Evaluation(100.0, correct, 100, {} if value is None else {"ppl": value}) for value in values]
    epochs = [EpochDone(3, 100, evaluation, 1.0, 0.0, {}, 0.0, HardwareContext()) for evaluation in found]
    return [health.epoch(epoch, rolling_back=False) for epoch in epochs]


@pytest.mark.parametrize(("direction", "bad"), [("min", 40.0), ("max", 0.5)])
def test_a_collapse_is_judged_by_the_chosen_metric(direction: str, bad: float) -> None:
    """The accuracy stays the same; the metric becomes worse, in the direction that is worse."""
    health = Health(RollbackSettings(), HealthSettings(), judged_by=f"ppl:{direction}")
    *_, last = evaluated(health, [10.0] * 8 + [bad] * 3)
    assert isinstance(last, Retreat)
    assert "ppl" in last.reason
    by_accuracy = Health(RollbackSettings(), HealthSettings())
    assert all(verdict == Proceed() for verdict in evaluated(by_accuracy, [10.0] * 8 + [bad] * 3))


def test_a_metric_that_some_evaluations_lack_is_judged_where_it_is() -> None:
    """A job may compute it every fifth epoch, and not in the first ones. The others change nothing."""
    health = Health(RollbackSettings(), HealthSettings(), judged_by="ppl:min")
    lacking: list[float | None] = [None] * 4
    sound = [value for _ in range(8) for value in (*lacking, 10.0)]
    *others, last = evaluated(health, [*sound, *(value for _ in range(3) for value in (*lacking, 40.0))])
    assert all(verdict == Proceed() for verdict in others)
    assert isinstance(last, Retreat)
    assert "ppl" in last.reason


def test_evaluations_of_another_metric_are_not_compared() -> None:
    """A resumed run whose `checkpoint.best` has changed begins to compare anew."""
    first = Health(RollbackSettings(), HealthSettings(), judged_by="ppl:max")
    evaluated(first, [1000.0] * 8)
    resumed = Health(RollbackSettings(), HealthSettings(), first.to_json())
    assert all(verdict == Proceed() for verdict in evaluated(resumed, [1.0] * 4))
    assert Settings().checkpoint.best_is_highest
