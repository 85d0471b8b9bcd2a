from __future__ import annotations

import anyio
import pytest

from tolaria.errors import LaneError, LaneStoppedError, UnknownGroupError
from tolaria.training.fence_desk import FenceDesk
from tolaria.training.fences import ChangeOptimizer, FenceReport, LaneCommand, OptimizerChanged

pytestmark = pytest.mark.anyio
COMMAND = ChangeOptimizer(None, {"momentum": 0.5}, None)
DONE = OptimizerChanged({}, {}, ())


class Lane:
    """Notes what is posted."""

    def __init__(self) -> None:
        self.posted: list[tuple[int, LaneCommand]] = []

    def post(self, ticket: int, command: LaneCommand) -> None:
        """Note it."""
        self.posted.append((ticket, command))


async def test_each_gets_the_answer_to_its_own_command() -> None:
    """Two wait; the lane answers in another order; each has its own report."""
    lane = Lane()
    desk = FenceDesk(lane.post)
    got: dict[str, int] = {}

    async def ask(name: str) -> None:
        got[name] = (await desk.carry_out(COMMAND)).global_step

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, "first")
        tasks.start_soon(ask, "second")
        await anyio.wait_all_tasks_blocked()
        (first, _), (second, _) = lane.posted
        desk.take(FenceReport(second, 20, DONE, None))
        desk.take(FenceReport(first, 10, DONE, None))
    assert got == {"first": 10, "second": 20}


async def test_a_refusal_reaches_the_asker() -> None:
    """What the lane refuses is raised where it was asked."""
    lane = Lane()
    desk = FenceDesk(lane.post)

    async def answer() -> None:
        await anyio.wait_all_tasks_blocked()
        desk.take(FenceReport(lane.posted[0][0], 5, None, UnknownGroupError("x", ["host"])))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(answer)
        with pytest.raises(UnknownGroupError):
            await desk.carry_out(COMMAND)


async def test_nobody_waits_for_a_fence_that_will_not_come() -> None:
    """When the run ends whoever waits is told, and whoever comes later is told at once."""
    desk = FenceDesk(Lane().post)

    async def end() -> None:
        await anyio.wait_all_tasks_blocked()
        desk.close()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(end)
        with pytest.raises(LaneStoppedError):
            await desk.carry_out(COMMAND)
    with pytest.raises(LaneStoppedError):
        await desk.carry_out(COMMAND)
    desk.take(FenceReport(99, 0, None, None))  # an answer that nobody waits for is nobody's


async def test_what_has_a_key_is_carried_out_once_though_its_asker_went_away() -> None:
    """A caller is cancelled, comes again with the same key, and gets the one result; it was recorded once."""
    lane = Lane()
    recorded: list[FenceReport] = []
    desk = FenceDesk(lane.post)
    with anyio.move_on_after(0.01):
        await desk.carry_out(COMMAND, key="r1", on_done=recorded.append)
    desk.take(FenceReport(lane.posted[0][0], 9, DONE, None))
    assert len(recorded) == 1
    assert (await desk.carry_out(COMMAND, key="r1", on_done=recorded.append)).global_step == 9
    assert len(lane.posted) == len(recorded) == 1


async def test_a_full_mailbox_is_a_refusal_and_nothing_else() -> None:
    """Too many commands: whoever asked is told, and nothing is kept waiting."""

    def full(_ticket: int, _command: LaneCommand) -> None:
        raise LaneError("256 commands are waiting for a fence already")

    desk = FenceDesk(full)
    with pytest.raises(LaneError, match="256 commands"):
        await desk.carry_out(COMMAND)
    told: list[FenceReport] = []
    desk.post(COMMAND, told.append)
    assert isinstance(told[0].error, LaneError)
