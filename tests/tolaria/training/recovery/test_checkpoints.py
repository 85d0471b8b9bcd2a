from __future__ import annotations

import math

import anyio
import anyio.to_thread
import pytest
from support.checkpoint_room import Rooms, evaluation, serving
from tolaria.training.recovery.checkpoints import (
    BUSY_S,
    CheckpointDesk,
    due_by_epochs,
    due_by_steps,
    retention_of,
)

from tolaria.checkpoint.store import Retention
from tolaria.config import CheckpointSettings
from tolaria.journal.rows import CheckpointRow

pytestmark = pytest.mark.anyio


# -- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "now", "last", "due"),
    [
        (0, 100, 0, False),
        (10, 9, 0, False),
        (10, 10, 0, True),
        (10, 25, 10, True),
        (10, 19, 10, False),
        (1, 1, 1, False),
    ],
)
def test_due_by_steps(every: int, now: int, last: int, due: bool) -> None:
    """So many updates after the last one, also when reports skip the very step; 0 is never."""
    assert due_by_steps(every, now, last) is due


@pytest.mark.parametrize(("every", "epoch", "due"), [(0, 1, False), (1, 1, True), (3, 2, False), (3, 3, True)])
def test_due_by_epochs(every: int, epoch: int, due: bool) -> None:
    """Every so many epochs; 0 is never."""
    assert due_by_epochs(every, epoch) is due


def test_retention_follows_the_settings() -> None:
    """Accuracy is best when highest, loss when lowest."""
    assert retention_of(CheckpointSettings(keep_last=7)) == Retention(last=7, best="highest")
    assert retention_of(CheckpointSettings(best="loss")) == Retention(last=3, best="lowest")


async def test_checkpoints_at_epochs_ends_and_between(rooms: Rooms) -> None:
    """Each is at the step where it fell due; what is not due writes nothing; a rollback starts the count again."""
    room = await rooms(every_epochs=2, every_steps=10)
    async with serving(room):
        for step in (9, 10, 15, 21):
            room.at(step)
            room.desk.stepped(step)
            await room.quiet()
        for epoch in (1, 2):
            room.at(25 + epoch)
            room.desk.epoch_over(evaluation(25 + epoch, epoch))
            await room.quiet()
        for step in (4, 13, 14):
            room.at(step)
            room.desk.stepped(step)
            await room.quiet()
    assert await room.steps() == [10, 21, 27, 14]
    assert room.value("duration_seconds_count") == 4
    assert room.value("size_bytes") == (await room.rows())[-1].size_bytes
    assert (room.log, room.desk.failing, room.value("failures_total")) == ([], "", 0)


async def test_a_resumed_run_counts_from_where_it_goes_on(rooms: Rooms) -> None:
    """Its first steps are no reason to write again what it was read from."""
    room = await rooms(every_steps=10)
    room.desk = CheckpointDesk(CheckpointSettings(every_steps=10), room.desk._tools, from_step=1000)
    async with serving(room):
        room.desk.stepped(1009)
        await room.quiet()
        assert room.kept == 0
        room.desk.stepped(1010)
        await room.quiet()
    assert room.kept == 1


async def test_updates_are_counted_from_an_operators_checkpoint_too(rooms: Rooms) -> None:
    """The next periodic one comes its full distance after it."""
    room = await rooms(every_steps=10)
    async with serving(room):
        room.at(8)
        await room.desk.create("test")
        for step in (17, 18):
            room.at(step)
            room.desk.stepped(step)
            await room.quiet()
    assert await room.steps() == [8, 18]


@pytest.mark.parametrize(("best", "metric"), [("accuracy", 0.5), ("loss", 2.0)])
async def test_only_a_validated_state_can_be_the_best(rooms: Rooms, best: str, metric: float) -> None:
    """An epoch's checkpoint has its figure, also when its fence is a little later, and one of the same step as well."""
    room = await rooms(every_steps=10, best=best)
    async with serving(room):
        room.at(12)
        room.desk.epoch_over(evaluation(10))
        await room.quiet()
        await room.desk.create("test")
        room.at(22)
        room.desk.stepped(22)
        await room.quiet()
        room.at(30)
        room.desk.epoch_over(evaluation(30, accuracy=math.nan, loss=math.nan))
        await room.quiet()
    assert [(row.global_step, row.metric) for row in await room.rows()] == [
        (12, metric),
        (12, metric),
        (22, None),
        (30, None),
    ]


async def test_a_figure_of_a_past_that_never_was_is_forgotten(rooms: Rooms) -> None:
    """After a rollback behind it, the same step again is another state."""
    room = await rooms(every_epochs=0)
    room.desk.epoch_over(evaluation(10))
    room.desk.stepped(5)
    room.at(10)
    assert (await room.desk.create("test")).metric is None


# -- a busy writer ---------------------------------------------------------------------------------------------------


async def test_what_falls_due_while_one_is_written_is_left_out_quietly(rooms: Rooms) -> None:
    """Nothing piles up behind a slow disk, the loop goes on, and the next one due is made."""
    room = await rooms(every_steps=1)
    room.disk.gate.clear()
    async with serving(room):
        for step in (1, 2, 3):
            room.at(step)
            room.desk.stepped(step)
            await anyio.wait_all_tasks_blocked()
        assert room.kept == 1
        room.disk.gate.set()
        await room.quiet()
        room.at(4)
        room.desk.stepped(4)
        await room.quiet()
    assert (room.kept, await room.steps(), room.log) == (2, [1, 4], [])


async def test_a_disk_that_hangs_is_told_of(rooms: Rooms) -> None:
    """It refuses nothing, so nothing has failed; but that there is no checkpoint shows until there is one."""
    room = await rooms()
    room.desk = CheckpointDesk(
        CheckpointSettings(), room.desk._tools, stalled_s=0.01, changed=lambda: room.log.append(("", room.desk.failing))
    )
    room.disk.gate.clear()
    async with serving(room):
        room.desk.epoch_over(evaluation(0))
        with anyio.fail_after(20):
            while not room.desk.failing:
                await anyio.sleep(0.001)
        room.disk.gate.set()
        await room.quiet()
    assert room.log == [("", "the checkpoint of step 0 takes longer than 0.01 s"), ("", "")]
    assert (await room.steps(), room.value("failures_total")) == ([0], 0)


async def test_an_operators_checkpoint_waits_for_its_turn(rooms: Rooms) -> None:
    """It comes after the one that is being written, and has the state of its own time."""
    room = await rooms(every_steps=1)
    room.disk.gate.clear()
    created: list[CheckpointRow] = []

    async def create() -> None:
        created.append(await room.desk.create("before lunch"))

    async with serving(room):
        room.at(1)
        room.desk.stepped(1)
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(create)
            await anyio.wait_all_tasks_blocked()
            assert (room.kept, created) == (1, [])
            room.at(2)
            room.disk.gate.set()
    assert ([row.global_step for row in created], await room.steps()) == ([2], [1, 2])


async def test_a_writer_that_seals_is_waited_for_by_an_operator_and_by_nobody_else(rooms: Rooms) -> None:
    """A periodic one is left out; an operator's is tried again until it is taken; no lease is kept back."""
    room = await rooms(every_steps=1)
    room.disk.gate.clear()
    for step in (1, 2):
        room.at(step)
        assert room.writer.write(await anyio.to_thread.run_sync(room.leased), metric=None) is not None
    async with serving(room):
        room.at(3)
        room.desk.stepped(3)
        await room.quiet()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(room.desk.create, "test")
            await room.asleep(1)
            room.disk.gate.set()
            with anyio.fail_after(20):
                while len(await room.steps()) < 2:
                    await anyio.sleep(0.001)
            room.wake()
    assert (await room.steps(), room.slept_s, room.log) == ([1, 2, 3], [BUSY_S], [])
    assert room.cache.leases == 0


async def test_one_that_nobody_waits_for_any_more_is_still_written(rooms: Rooms) -> None:
    """An operator who gives up leaves the desk as it was: no lease, no turn is lost."""
    room = await rooms(every_epochs=0)
    room.disk.gate.clear()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(room.desk.create, "test")
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    room.disk.gate.set()
    room.at(1)
    await room.desk.create("again")
    assert await room.steps() == [0, 1]
    assert room.cache.leases == 0
