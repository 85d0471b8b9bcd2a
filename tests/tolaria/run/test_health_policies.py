from __future__ import annotations

import math

import pytest

from leyline.v1.state_pb2 import HardwareContext
from tolaria.config import HealthSettings, RollbackSettings, Settings
from tolaria.emergency import Trigger
from tolaria.lane.messages import EpochDone, StepDone
from tolaria.run.health import Health
from tolaria.run.verdicts import Halt, Proceed, Retreat, Verdict
from tolaria.values.evaluation import Evaluation

POLICIES = ["full", "skip", "watch"]


def judged(policy: str, *, automatic: bool = True) -> Health:
    """Returns the health of a run with a hundred healthy steps."""
    settings = HealthSettings.model_validate({"policy": policy, "window": 16, "skips_data_max": 4})
    health = Health(RollbackSettings(automatic=automatic), settings)
    for at in range(1, 101):
        step = StepDone(at, 1, 1.0, 1.0, 8, 0.1, 0.0, 0.0, batches=range(at, at + 1), judged=1.0)
        health.step(step, rolling_back=False)
    return health


def exploding(health: Health) -> list[Verdict]:
    """Judges two steps that exploded."""
    wild = (StepDone(at, 1, 1e3, 1.0, 8, 0.1, 0.0, 0.0, batches=range(at, at + 1), judged=1e3) for at in (101, 102))
    return [health.step(step, rolling_back=False) for step in wild]


def skipping(health: Health, *, times: int, finite: bool | None = None) -> Verdict:
    """Judges steps that were not finite; `finite`: whether the parameters are, after the last one."""
    verdict: Verdict = Proceed()
    for number in range(1, times + 1):
        found = finite if number == times else None
        step = StepDone(100, 1, math.nan, 1.0, 8, 0.1, 0.0, 0.0, True, batches=range(9, 10), parameters_finite=found)
        verdict = health.step(step, rolling_back=False)
    return verdict


def collapsing(health: Health) -> list[Verdict]:
    """Judges good evaluations, then bad ones."""
    counts = [90] * 8 + [10] * 4
    evaluations = [Evaluation(100.0, count, 100) for count in counts]
    epochs = [EpochDone(3, 100, found, 1.0, 0.0, {}, 0.0, HardwareContext()) for found in evaluations]
    return [health.epoch(epoch, rolling_back=False) for epoch in epochs]


@pytest.mark.parametrize("policy", POLICIES)
def test_only_full_rolls_back_from_an_explosion(policy: str) -> None:
    """The others report it."""
    *_, last = exploding(judged(policy))
    if policy == "full":
        assert isinstance(last, Retreat)
    else:
        assert isinstance(last, Proceed)
        assert "loss 1000" in last.alarm


@pytest.mark.parametrize("policy", POLICIES)
def test_only_full_rolls_back_from_worse_evaluations(policy: str) -> None:
    """The others train on."""
    assert any(isinstance(verdict, Retreat) for verdict in collapsing(judged(policy))) == (policy == "full")


@pytest.mark.parametrize(("policy", "kind"), [("full", Retreat), ("skip", Halt), ("watch", Proceed)])
def test_parameters_that_are_not_finite(policy: str, kind: type) -> None:
    """Going on would be in vain: full goes back, skip halts, and watch reports."""
    verdict = skipping(judged(policy), times=3, finite=False)
    assert isinstance(verdict, kind)
    if isinstance(verdict, Halt):
        assert verdict.trigger is Trigger.PARAMETERS_NOT_FINITE
    if isinstance(verdict, Proceed):
        assert "not finite" in verdict.alarm


@pytest.mark.parametrize(("policy", "halts"), [("full", True), ("skip", True), ("watch", False)])
def test_too_much_ill_data(policy: str, halts: bool) -> None:
    """Halts the run unless it is only watched."""
    verdict = skipping(judged(policy), times=4, finite=True)
    assert isinstance(verdict, Halt) == halts
    assert isinstance(verdict, Halt) or "the data are ill" in verdict.alarm  # type: ignore[union-attr]


def test_skip_is_full_without_automatic_rollbacks() -> None:
    """`rollback.automatic = false`, as in earlier versions, gives the same verdicts."""
    for act in (exploding, collapsing):
        assert act(judged("skip")) == act(judged("full", automatic=False)) == act(judged("skip", automatic=False))


@pytest.mark.parametrize(("policy", "skips"), [("full", True), ("skip", True), ("watch", False)])
def test_watching_trains_with_extreme_losses(policy: str, skips: bool) -> None:
    """The other policies skip them, unless `health.skip_extreme` is off."""
    assert Settings(health=HealthSettings.model_validate({"policy": policy})).health.skips_extreme is skips
    off = HealthSettings.model_validate({"policy": policy, "skip_extreme": False})
    assert not off.skips_extreme
