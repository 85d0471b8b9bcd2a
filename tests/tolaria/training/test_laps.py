from __future__ import annotations

import anyio
import pytest

from leyline.v1.state_pb2 import HardwareContext
from tolaria.errors import LaneFailedError
from tolaria.jobs import Evaluation
from tolaria.training.laps import Laps
from tolaria.training.place import EpochPlace
from tolaria.training.reports import EpochReport, LaneEnded

pytestmark = pytest.mark.anyio


def report(epoch: int) -> EpochReport:
    """The end of an epoch."""
    return EpochReport(
        epoch, 8, Evaluation(4.0, 6, 8), 1.0, 0.1, 0.0, learning_rates={}, momentum=0.0, hardware=HardwareContext()
    )


async def still_waits(laps: Laps) -> bool:
    """Whether somebody who waits for the epoch's end waits on when nothing more is to happen."""
    told = list[EpochReport | None]()

    async def wait() -> None:
        told.append(await laps.over())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    return not told


@pytest.mark.parametrize(("over", "following"), [(True, 4), (False, 3)])
def test_it_begins_where_the_run_does(over: bool, following: int) -> None:
    """After an epoch that is over comes the next; one in the midst of which a run was saved goes on."""
    laps = Laps(EpochPlace(3, over=over))
    assert (laps.next_epoch, laps.lane_ended) == (following, False)


async def test_an_epochs_end_is_told_once() -> None:
    """Whoever waits gets the report; the next epoch's waiting begins without it."""
    laps = Laps(EpochPlace())
    laps.begin()
    laps.reported(report(1))
    told = await laps.over()
    assert told is not None
    assert told.epoch == 1
    assert laps.next_epoch == 2
    laps.begin()
    assert await still_waits(laps)


@pytest.mark.parametrize("given_up", [True, False])
async def test_going_back_orders_anew_what_was_given_up(given_up: bool) -> None:
    """The epoch that goes on is that of the place; one that the lane has given up has to be ordered anew."""
    laps = Laps(EpochPlace(2, over=True))
    laps.begin()
    laps.reported(report(3))
    laps.begin()
    laps.went_back(EpochPlace(1, over=False), given_up=given_up)
    assert laps.next_epoch == 1
    assert await still_waits(laps) is not given_up


async def test_a_report_that_was_undone_is_not_told() -> None:
    """The epoch ended, and was gone back from before anybody looked: there is no boundary to cross."""
    laps = Laps(EpochPlace())
    laps.begin()
    laps.reported(report(1))
    laps.went_back(EpochPlace(1, over=False), given_up=True)
    assert await laps.over() is None
    assert laps.next_epoch == 1


async def test_a_lane_that_was_told_to_end_has_ended() -> None:
    """It is no failure, whatever was waited for; the epoch that it was stopped in has no report."""
    laps = Laps(EpochPlace())
    laps.begin()
    laps.reported(report(1))
    laps.begin()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(laps.lane_over)
        await anyio.wait_all_tasks_blocked()
        laps.ended(LaneEnded(8, None))
    assert laps.lane_ended
    assert await laps.over() is None


async def test_a_lane_that_has_failed_fails_whoever_waits() -> None:
    """In the words of what the job raised, which is the cause."""
    laps = Laps(EpochPlace())
    laps.begin()
    error = RuntimeError("the disk is gone")
    laps.ended(LaneEnded(8, error))
    for waiting in (laps.over, laps.lane_over):
        with pytest.raises(LaneFailedError, match="RuntimeError: the disk is gone") as caught:
            await waiting()
        assert caught.value.__cause__ is error
