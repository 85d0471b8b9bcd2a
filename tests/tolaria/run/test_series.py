"""The time series of a run before anything has happened."""

from __future__ import annotations

import math

import pytest
from prometheus_client import Counter, Histogram

from support.runs import FakePeers, new_run, running
from tolaria.config import KasminaSettings, TamiyoSettings
from tolaria.peers.connect import connected_peers
from tolaria.service.readiness import LANE_PHASES, publish_phase, readiness
from tolaria.values.evaluation import Evaluation
from tolaria.values.optimization import ActiveAdjustment, Adjustment

pytestmark = pytest.mark.anyio

SERIES = [
    ("training.skipped_steps_total", {"reason": "loss_not_finite"}),
    ("rollback.requests_total", {"origin": "health", "outcome": "restored"}),
    ("rollback.requests_total", {"origin": "operator", "outcome": "deadline_exceeded"}),
    ("rollback.failures_total", {"stage": "restore", "reason": "aborted"}),
    ("rollback.duration_seconds_count", {"tier": "fast", "outcome": "restored"}),
    ("command.applied_total", {"type": "rollback"}),
    ("command.rejected_total", {"reason": "replayed"}),
    ("command.rejected_total", {"reason": "late"}),
    ("lr_controller.adjustments_total", {"origin": "rollback"}),
    ("lr_controller.integrity_violations_total", {"group": "host"}),
    ("peer.retries_total", {"peer": "tamiyo", "method": "EvaluateEpoch"}),
    ("peer.call_duration_seconds_count", {"peer": "kasmina", "method": "ApplyCommand", "outcome": "timeout"}),
]


async def test_every_counter_with_labels_starts_at_zero() -> None:
    """A rate over a series that appears with its first increase misses that increase."""
    run = new_run(FakePeers(), epochs=1)
    metrics, emitter = run.metrics, run.emitter
    settings = TamiyoSettings(target="127.0.0.1:1"), KasminaSettings(target="127.0.0.1:1")
    async with running(run):
        async with connected_peers(*settings, breakers=run.safeguards.breakers, metrics=metrics, emitter=emitter):
            pass
        assert [run.sample(f"tolaria.{name}", labels) for name, labels in SERIES] == [0.0] * len(SERIES)
        await run.until(lambda: run.state == "FINISHED")
    labelled = [metric for metric in vars(metrics).values() if isinstance(metric, Counter | Histogram)]
    empty = [name for metric in labelled for family in metric.collect() for name in [family.name] if not family.samples]
    by_caller = ["tolaria.metrics.requests", "tolaria.server.calls"]  # who is not known yet
    by_tracker = ["tolaria.tracker.failures", "tolaria.tracker.lost_segments"]  # of which there is none
    assert sorted(empty) == [*by_caller, *by_tracker]


async def test_microbatches_that_are_left_out_are_counted() -> None:
    """From 0 on, apart from skipped steps."""
    options = {"corrupted": [[1, 0], [1, 3]], "factor": float("nan")}
    run = new_run(FakePeers(), job="CorruptedDataJob", epochs=1, accumulate=2, options=options)
    async with running(run):
        assert run.sample("tolaria.training.skipped_microbatches_total") == 0
        await run.until(lambda: run.state == "FINISHED")
    assert run.sample("tolaria.training.skipped_microbatches_total") == 2
    assert run.status.skipped_steps == 0


async def test_an_accuracy_above_one_is_reported() -> None:
    """The first look cannot find it in a job that counts right tokens and samples: at first few tokens are right."""
    run = new_run(FakePeers(), epochs=2)
    run.job.evaluate = lambda *_: Evaluation(1.0, 9, 8)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
    found = run.emitter.attributes_of("tolaria.accuracy_above_one")
    assert [event["epoch"] for event in found] == ["1", "2"]


async def test_a_state_that_fits_no_snapshot_is_a_detail_of_readyz() -> None:
    """Training goes on, and the service is ready; only a fast rollback is impossible."""
    sections: dict[str, object] = {"rollback": {"memory_mb": 1}}
    run = new_run(FakePeers(), job="support.user_jobs:Line", epochs=1, options={"width": 10**5}, sections=sections)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
        found = readiness(run.core)
    assert (found.reasons, len(found.details)) == ([], 1)
    assert found.details[0].startswith("no fast rollback: ")


async def test_figures_of_validation_and_steps_have_metrics() -> None:
    """The older name of the accuracy stays; the age of a checkpoint counts from the start while there is none."""
    run = new_run(FakePeers(), epochs=1)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
    accuracy, loss = run.status.validation_accuracy, run.status.validation_loss
    assert run.sample("tolaria.training.accuracy") == run.sample("tolaria.validation.accuracy") == accuracy
    assert run.sample("tolaria.validation.metric", {"name": "loss"}) == run.sample("tolaria.validation.loss") == loss
    assert run.sample("tolaria.training.best_step") == run.status.global_step > 0
    age_s = run.sample("tolaria.checkpoint.age_seconds")
    assert age_s is not None
    assert 0 < age_s < 60


async def test_an_accuracy_that_a_job_does_not_count_is_not_zero() -> None:
    """NaN, which no alert takes for a bad one."""
    run = new_run(FakePeers(), job="support.metric_jobs:MetricsJob", epochs=1)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
    accuracies = [run.sample(f"tolaria.{name}.accuracy") for name in ("training", "validation")]
    assert all(accuracy is not None and math.isnan(accuracy) for accuracy in accuracies)


async def test_the_lanes_phase_is_a_metric_while_the_run_is_running() -> None:
    """An alert on a run that takes no steps spares one that evaluates, and a run that is held or has ended has none."""
    run = new_run(FakePeers(), epochs=10**6)
    publish_phase(run.core)

    def phases() -> dict[str, float | None]:
        return {name: run.sample("tolaria.lane.phase", {"rank": "0", "phase": name}) for name in LANE_PHASES}

    async with running(run):
        await run.until(lambda: run.state == "RUNNING")
        run.status.lane_phase = lambda: ("evaluating", 45.0)
        assert phases() == dict.fromkeys(LANE_PHASES, 0.0) | {"evaluating": 1.0}
        run.status.lane_phase = lambda: ("", 0.0)
        assert phases() == dict.fromkeys(LANE_PHASES, 0.0) | {"stepping": 1.0}
        await run.run.pause("a break")
        assert phases() == dict.fromkeys(LANE_PHASES, 0.0)
        await run.run.stop("enough")


FACTORS = [
    ([("operator", None, 0.5), ("operator", "host", 0.5), ("operator", "seed:a", 0.8)], ("operator", 0.25)),
    ([("rollback", None, 0.5), ("rollback", None, 0.25)], ("rollback", 0.25)),
    ([("tamiyo", None, 0.1), ("operator", None, 3.0)], ("tamiyo", 0.1)),
]


@pytest.mark.parametrize(("factors", "expected"), FACTORS)
async def test_factors_on_learning_rates_have_a_metric(
    factors: list[tuple[str, str | None, float]], expected: tuple[str, float]
) -> None:
    """By origin the smallest of all groups: an alert finds rates far below their schedule, which may itself be low."""
    run = new_run(FakePeers(), epochs=10**6)
    origin, factor = expected
    async with running(run):
        assert run.sample("tolaria.lr_controller.factor", {"origin": origin}) == 1.0
        for number, (by, group, value) in enumerate(factors):
            adjustment = Adjustment(group=group, factor=value, origin=by, request_id=str(number), reason="a test")
            run.status.adjustments = (*run.status.adjustments, ActiveAdjustment(adjustment, 0))
        await run.until(lambda: run.sample("tolaria.lr_controller.factor", {"origin": origin}) != 1.0)
        assert run.sample("tolaria.lr_controller.factor", {"origin": origin}) == pytest.approx(factor)
        await run.run.stop("enough")
