from __future__ import annotations

import asyncio

import anyio
import pytest

from faults.small_training import Training
from tolaria.errors import LaneError, LaneStoppedError
from tolaria.images.pool import Lease
from tolaria.state.snapshots import SnapshotRing
from tolaria.training.fence_desk import FenceDesk
from tolaria.training.fences import BatchesLeftOut, FenceReport, LaneCommand
from tolaria.training.recovery.keeper import Kept
from tolaria.training.recovery.keeping import kept_image
from tolaria.values.training import Position

pytestmark = pytest.mark.anyio


class Lane:
    """A desk whose lane answers when the test says so."""

    def __init__(self, training: Training) -> None:
        self.tickets: list[int] = []
        self.desk = FenceDesk(self.post)
        self.cache = SnapshotRing(bytes_max=2**28, entries_max=1, seal=False)
        training.train(3)
        self.cache.capture(training.state())

    def post(self, ticket: int, _command: LaneCommand) -> None:
        self.tickets.append(ticket)

    def answer(self) -> None:
        lease = self.cache.hold(3)
        assert lease is not None
        self.desk.take(FenceReport(self.tickets.pop(), 3, Kept(Position(3, 1), lease), None))

    @property
    def leases(self) -> int:
        return self.cache.leases


async def test_the_lease_is_the_callers(training: Training) -> None:
    """Told of when the answer comes, before whoever waits runs on."""
    lane, told, got = Lane(training), list[str](), list[Lease]()

    async def keep() -> None:
        got.append(await kept_image(lane.desk, lambda: told.append("kept")))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep)
        await anyio.wait_all_tasks_blocked()
        lane.answer()
        assert (told, got) == (["kept"], [])
    assert (len(got), lane.leases) == (1, 1)


@pytest.mark.parametrize("when", ["before", "in the same turn"])
async def test_who_goes_away_leaves_no_lease(training: Training, when: str) -> None:
    """Whether the image arrives later or in the very turn in which gRPC cancels who waits, by asyncio's own means."""
    lane = Lane(training)
    waiting = asyncio.get_running_loop().create_task(kept_image(lane.desk))
    await anyio.wait_all_tasks_blocked()
    if when == "before":
        waiting.cancel()
        await anyio.wait_all_tasks_blocked()
        lane.answer()
    else:
        lane.answer()
        assert lane.leases == 1
        waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert lane.leases == 0


async def test_an_odd_answer_and_a_lane_that_has_ended_are_different_errors(training: Training) -> None:
    """Only the second one means that there is nobody to ask any more."""
    lane = Lane(training)
    async with anyio.create_task_group() as tasks:

        async def odd() -> None:
            with pytest.raises(LaneError, match="BatchesLeftOut") as told:
                await kept_image(lane.desk)
            assert not isinstance(told.value, LaneStoppedError)

        tasks.start_soon(odd)
        await anyio.wait_all_tasks_blocked()
        lane.desk.take(FenceReport(lane.tickets.pop(), 3, BatchesLeftOut(0), None))
    lane.desk.close()
    with pytest.raises(LaneStoppedError):
        await kept_image(lane.desk)
