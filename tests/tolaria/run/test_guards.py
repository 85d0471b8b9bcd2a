"""Sound runs are left alone and ill ones heal: short forms of the trial in tests/benchmarks/bench_guards.py."""

from __future__ import annotations

import math

import anyio
import pytest

from support.guard_jobs import TRIALS
from support.guard_runs import ENDED, hosted, run_to_end
from support.runs import RunUnderTest, running
from tolaria.values.optimization import Adjustment

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]


BY_STEPS = {"rollback": {"every_steps": 4}}
"""Snapshots as often on a busy machine as on a quiet one, for tests of how far a run gets after a fault."""


def trial(name: str, epochs: int | None = None) -> RunUnderTest:
    """Returns a trial, for fewer epochs if that is enough."""
    chosen = TRIALS[name]
    sections = {"optimizer": dict(chosen.rates), **BY_STEPS}
    return hosted("support.guard_jobs:GuardJob", epochs or chosen.epochs, {"trial": name}, sections=sections)


def accuracy(run: RunUnderTest) -> float:
    """The last validation's."""
    return math.nan if run.status.last_epoch is None else run.status.last_epoch.evaluation.accuracy


@pytest.mark.parametrize(
    ("job", "options", "epochs", "long_epochs"),
    [
        ("support.user_jobs:Digits", {"optimizer": "sgd", "lr": 0.03, "batch": 8}, 4, 40),
        ("support.user_jobs:Digits", {"optimizer": "adam", "lr": 3e-3, "dropout": 0.3}, 10, 60),
        ("tolaria.jobs.digits:digits", {"batch_size": 8}, 1, 20),
        ("tolaria.jobs.digits:digits", {"batch_size": 4}, 1, 12),
    ],
)
async def test_small_batches_and_noise_are_no_explosion(
    job: str, options: dict[str, object], epochs: int, long_epochs: int, request: pytest.FixtureRequest
) -> None:
    """However large the losses of single batches are beside those of a model that has learned."""
    long = request.config.getoption("--long")
    for seed in (0, 1) if long else (0,):
        run = hosted(job, long_epochs if long else epochs, options, seed=seed)
        await run_to_end(run, 800)
        assert (run.state, run.status.rollbacks) == ("FINISHED", 0), run.status.state_reason
        assert accuracy(run) >= (0.95 if long else 0.75)


async def test_tasks_that_conflict_on_purpose_are_no_explosion(request: pytest.FixtureRequest) -> None:
    """Their gradients jump; every loss is finite."""
    run = trial("four conflicting tasks", 64 if request.config.getoption("--long") else 8)
    await run_to_end(run)
    assert (run.state, run.status.rollbacks, run.health.skipped_steps) == ("FINISHED", 0, 0)


@pytest.mark.parametrize(
    "name",
    [
        "targets that grow, evaluated every two steps",
        pytest.param("adversaries that oscillate", marks=pytest.mark.slow),
    ],
)
async def test_losses_that_rise_by_themselves_cost_at_most_one_rollback(name: str) -> None:
    """And never halt the run."""
    run = trial(name, 200)
    await run_to_end(run)
    assert run.state == "FINISHED", run.status.state_reason
    assert run.status.rollbacks <= 1


@pytest.mark.parametrize(("announced", "rollbacks"), [("announced", 0), ("not announced", 1)])
async def test_a_curriculum_is_no_explosion(announced: str, rollbacks: int) -> None:
    """Half of the classes come later. A change that is announced costs nothing, another at most one rollback."""
    run = trial(f"curriculum, {announced}", 22)
    await run_to_end(run)
    assert run.state == "FINISHED", run.status.state_reason
    assert run.status.rollbacks <= rollbacks
    assert accuracy(run) >= 0.9
    assert "tolaria.loss_regime_accepted" in run.events


@pytest.mark.parametrize(
    ("fault", "rollbacks", "skipped"),
    [
        ("rate x 500", range(1, 4), range(8)),
        ("bit flip", range(1, 2), range(1, 4)),  # the lane may take steps before it is held
        ("30 NaN batches", range(1), range(30, 31)),
    ],
)
async def test_an_ill_run_heals(fault: str, rollbacks: range, skipped: range) -> None:
    """Bad data are skipped; ruined parameters are undone, also when what ruined them goes on for some steps."""
    run = trial(f"MLP, SGD: {fault}")
    try:
        await run_to_end(run)
    finally:
        run.job.close()
    assert run.state == "FINISHED", run.status.state_reason
    assert run.status.rollbacks in rollbacks
    assert run.health.skipped_steps in skipped
    assert accuracy(run) >= 0.9  # 0.98 without the fault; up to three cuts of the rate leave less to the same epochs


async def test_a_learning_rate_that_is_much_too_high_for_some_updates(request: pytest.FixtureRequest) -> None:
    """An operator sets it to 150 times the usual rate for 12 updates."""
    step_s = 0.05 if request.config.getoption("--long") else 0.002
    run = hosted("support.user_jobs:Line", 8, {"step_s": step_s, "samples": 400}, sections=BY_STEPS)
    slip = Adjustment(group=None, value=1.5, expires_after_steps=12, origin="operator", request_id="1", reason="a slip")
    async with running(run):
        with anyio.fail_after(600):
            await run.status.feed.until(lambda: run.status.epoch >= 4)
            await run.run.adjust_learning_rate(slip)
            await run.status.feed.until(lambda: run.state in ENDED)
    assert run.state == "FINISHED", run.status.state_reason
    assert run.status.rollbacks >= 1
    assert run.status.last_epoch is not None
    assert run.status.last_epoch.evaluation.loss < 0.5  # of 4 before training
