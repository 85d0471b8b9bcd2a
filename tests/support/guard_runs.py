"""Trials of guards inside the service: a complete run in this process, with a controller that requests no change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio

from support.guard_jobs import Trial
from support.guard_loops import Outcome
from support.runs import FakePeers, RunUnderTest, new_run, running

ENDED = frozenset({"FINISHED", "FAILED", "HALTED"})


async def run_to_end(run: RunUnderTest, within_s: float = 300.0) -> None:
    """Runs until the run has ended or halted."""
    async with running(run):
        with anyio.fail_after(within_s):
            while run.state not in ENDED:
                await anyio.sleep(0.01)


def hosted(
    job: str, epochs: int, options: Mapping[str, Any], *, seed: int = 0, sections: Mapping[str, Any] | None = None
) -> RunUnderTest:
    """Returns a run with the defaults of rollbacks and checkpoints."""
    chosen = {"rollback": {}, "checkpoint": {}, **(sections or {})}
    return new_run(FakePeers(), job=job, sections=chosen, epochs=epochs, seed=seed, options=dict(options))


async def _trial(trial: Trial, seed: int) -> Outcome:
    options, sections = {"trial": trial.name}, {"optimizer": dict(trial.rates)}
    run = hosted("support.guard_jobs:GuardJob", trial.epochs, options, seed=seed, sections=sections)
    try:
        await run_to_end(run)
    finally:
        run.job.close()
    outcome = Outcome(retreats=run.status.rollbacks, skipped=run.health.skipped_steps)
    if run.state != "FINISHED":
        outcome.halted = f"{run.state}: {run.status.state_reason}"
    elif run.status.last_epoch is not None:
        found = run.status.last_epoch.evaluation
        outcome.metric = found.accuracy if run.job.task.has_accuracy else found.loss
    return outcome


def run_hosted(trial: Trial, seed: int = 0) -> Outcome:
    """Runs a trial inside the service. The outcome has no losses."""
    return anyio.run(_trial, trial, seed)
