from __future__ import annotations

from dataclasses import replace

import pytest

from leyline.v1.state_pb2 import HardwareContext
from tolaria.config import RollbackSettings
from tolaria.jobs import Evaluation
from tolaria.training.judge import Health, Proceed, observe
from tolaria.training.recovery.retreats import Retreats
from tolaria.training.reports import EpochReport, StepReport
from tolaria.training.verdicts import Halt, Retreat

SETTINGS = RollbackSettings(warmup_steps=5, automatic_max=2)


def step(number: int, loss: float, *, epoch: int = 1, place: int = 0) -> StepReport:
    """One update on the batch at that place."""
    return StepReport(number, epoch, loss, 1.0, 8, 0.1, 0.0, 0.0, batches=range(place, place + 1))


def epoch(accuracy: float) -> EpochReport:
    """An epoch with that validation accuracy."""
    found = Evaluation(1.0, int(accuracy * 100), 100)
    return EpochReport(2, 100, found, 1.0, 0.1, 0.0, {}, 0.0, HardwareContext())


def trained(retreats: Retreats, steps: int, loss: float, health: Health | None = None) -> Health:
    """So many healthy steps."""
    health = health or Health()
    for number in range(steps):
        report = step(number, loss)
        assert retreats.step(report, health) == Proceed()
        health = observe(health, report)
        retreats.observed(health)
    return health


def test_what_is_spoilt_until_the_run_is_back_is_told_once() -> None:
    """The step that begins the way back, and what goes wrong until it is over; healthy ones in between are not."""
    retreats = Retreats(SETTINGS)
    health = trained(retreats, 10, 1.0)
    assert isinstance(retreats.step(step(11, 100.0, place=3), health), Retreat)
    assert retreats.step(step(12, 1.0, place=4), health) == Proceed()
    assert retreats.step(step(13, 200.0, place=5), health) == Proceed()
    assert retreats.epoch(epoch(0.0)) == Proceed()
    assert retreats.over() == {(1, 3), (1, 5)}
    assert retreats.over() == frozenset()
    assert isinstance(retreats.step(step(14, 100.0), health), Retreat)
    retreats.over()
    assert isinstance(retreats.step(step(15, 100.0), health), Halt)


def test_a_run_that_is_resumed_is_measured_as_before() -> None:
    """What was no explosion for the whole run is none after its restart; a budget that was spent stays spent."""
    before = Retreats(SETTINGS)
    trained(before, 10, 2.0)
    assert before.epoch(epoch(0.9)) == Proceed()
    after = Retreats(SETTINGS, before.scale)
    health = trained(after, 10, 0.001)
    small = step(11, 0.2)  # 200 times the average of late, a tenth of what the run began with
    assert after.step(small, health) == Proceed()
    assert isinstance(Retreats(SETTINGS, "").step(small, health), Retreat)
    assert isinstance(after.epoch(epoch(0.5)), Retreat)
    after.over()
    assert isinstance(after.step(step(12, 50.0), health), Retreat)
    again = Retreats(SETTINGS, after.scale)
    assert isinstance(again.step(step(13, 50.0), trained(again, 10, 0.001)), Halt)


@pytest.mark.parametrize("scale", ["", "{", "[]", '{"loss_level": "much"}'])
def test_a_scale_that_cannot_be_read_is_a_new_one(scale: str) -> None:
    """A journal of another making stops no start."""
    assert Retreats(SETTINGS, scale).scale == Retreats(SETTINGS).scale


def test_nothing_is_judged_where_nobody_wants_it() -> None:
    """Without automatic rollbacks there are no verdicts."""
    retreats = Retreats(RollbackSettings(automatic=False))
    health = trained(retreats, 30, 1.0)
    assert retreats.step(step(31, 1e9), health) == Proceed()
    assert retreats.epoch(epoch(0.9)) == Proceed()
    assert retreats.epoch(epoch(0.0)) == Proceed()


def test_what_is_healthy_ends_where_it_went_wrong() -> None:
    """Not with a step that exploded, nor with one on the way back; a collapse takes the epoch's steps back."""
    retreats = Retreats(SETTINGS)
    health = trained(retreats, 10, 1.0)
    assert retreats.healthy_step == 9
    assert isinstance(retreats.step(step(10, 100.0), health), Retreat)
    assert retreats.step(step(11, 1.0), health) == Proceed()
    assert retreats.healthy_step == 9
    retreats.over()
    assert retreats.epoch(replace(epoch(0.9), global_step=9)) == Proceed()
    assert retreats.step(step(12, 1.0), health) == Proceed()
    assert retreats.healthy_step == 12
    assert isinstance(retreats.epoch(epoch(0.1)), Retreat)
    assert retreats.healthy_step == 9
