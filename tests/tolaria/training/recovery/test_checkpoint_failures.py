from __future__ import annotations

import errno

import anyio
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN
from support.checkpoint_room import Rooms, evaluation, serving
from tolaria.errors import CheckpointWriteError, LaneError, LaneStoppedError, StateUnsupportedError, TolariaError
from tolaria.journal.rows import FaultRow

pytestmark = pytest.mark.anyio

COOLDOWN_S = 30.0


@pytest.mark.parametrize(("on_failure", "held"), [("pause", ["hold", "go_on"]), ("continue", [])])
async def test_a_full_disk_is_told_and_mends_by_itself(rooms: Rooms, on_failure: str, held: list[str]) -> None:
    """Held or not, as set; tried again with a fresh state until there is space; then all is as before."""
    room = await rooms(on_failure=on_failure, retry_s=7.0)
    room.disk.full = True
    async with serving(room):
        room.at(10)
        room.desk.epoch_over(evaluation(10))
        await room.quiet(sleeps=1)
        assert "ENOSPC" in room.desk.failing
        room.at(11)
        room.wake()
        await room.quiet(sleeps=2)
        assert await room.steps() == []
        room.disk.full = False
        room.at(12)
        room.wake()
        await room.quiet()
        assert (room.desk.failing, await room.steps()) == ("", [12])
        room.at(20)
        room.desk.epoch_over(evaluation(20))
        await room.quiet()
    assert await room.steps() == [12, 20]
    assert room.slept_s == [7.0, 7.0]
    told = [event.attributes for event in room.emitter.events if event.name == "tolaria.checkpoint_failed"]
    assert [dict(each) for each in told] == [
        {"step": str(step), "stage": "write", "reason": "ENOSPC"} for step in (10, 11)
    ]
    assert (room.value("failures_total"), room.value("duration_seconds_count")) == (2, 2)
    assert [word for word in room.words() if word != "failing"] == held
    assert len({reason for word, reason in room.log if word != "failing"}) <= 1
    assert [reason for word, reason in room.log if word == "failing"][-1] == ""
    faults = await anyio.to_thread.run_sync(room.storage.journal.rows, FaultRow)
    assert [(fault.kind, fault.global_step) for fault in faults] == [("checkpoint_failed", 10)]  # told once


async def test_the_figure_of_a_held_state_survives_the_retries(rooms: Rooms) -> None:
    """A run that stands is written late as what it was validated as."""
    room = await rooms()
    room.disk.full = True
    async with serving(room):
        room.at(11)
        room.desk.epoch_over(evaluation(10))
        await room.quiet(sleeps=1)
        room.desk.stepped(10)  # reports come a little behind the lane
        room.disk.full = False
        room.wake()
        await room.quiet()
    assert [(row.global_step, row.metric) for row in await room.rows()] == [(11, 0.5)]


async def test_nothing_more_is_asked_for_while_it_is_mended(rooms: Rooms) -> None:
    """Epochs that end meanwhile do not hurry the retries."""
    room = await rooms(on_failure="continue")
    room.disk.full = True
    async with serving(room):
        for step in (10, 20, 30):
            room.at(step)
            room.desk.epoch_over(evaluation(step))
            await room.quiet(sleeps=1)
    assert room.kept == 1


async def test_the_breaker_opens_and_is_closed_again_by_a_checkpoint(rooms: Rooms) -> None:
    """Three failures open it; a success while it cools down lets training go on, and one after that closes it."""
    room = await rooms()
    room.disk.full = True
    async with serving(room):
        room.at(1)
        room.desk.epoch_over(evaluation(1))
        for sleeps in (1, 2, 3):
            await room.quiet(sleeps=sleeps)
            room.wake()
        await room.quiet(sleeps=4)
        assert room.breaker.state == CIRCUIT_STATE_OPEN
        room.disk.full = False
        room.wake()
        await room.quiet(sleeps=5)
        assert (room.breaker.state, room.desk.failing) == (CIRCUIT_STATE_OPEN, "")
        assert room.words().count("go_on") == 1
        room.now_s = COOLDOWN_S
        room.wake()
        await room.quiet()
    assert room.breaker.state == CIRCUIT_STATE_CLOSED
    assert (len(room.slept_s), len(await room.steps())) == (5, 2)


async def test_an_operators_checkpoint_that_fails_counts_and_one_that_succeeds_mends(rooms: Rooms) -> None:
    """Whoever asked is told why; the run is held and goes on as with any other; the retry that slept does no more."""
    room = await rooms()
    room.disk.full = True
    async with serving(room):
        with pytest.raises(CheckpointWriteError, match="ENOSPC"):
            await room.desk.create("test")
        await room.quiet(sleeps=1)
        room.disk.full = False
        room.at(5)
        assert (await room.desk.create("test")).global_step == 5
        assert (room.desk.failing, [word for word in room.words() if word != "failing"]) == ("", ["hold", "go_on"])
        room.at(6)
        room.desk.epoch_over(evaluation(6))  # while the retry still sleeps
        room.wake()
        await room.quiet()
    assert await room.steps() == [5, 6]


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (StateUnsupportedError("group/0/x", "an object"), "group/0/x: an object"),
        (OSError(errno.EIO, "made to fail"), "EIO"),
        (LaneError("256 commands are waiting"), "256 commands are waiting"),
    ],
)
async def test_a_state_that_cannot_be_kept_is_a_failure_like_any(
    rooms: Rooms, refusal: TolariaError | OSError, reason: str
) -> None:
    """The task lives on, and the event names the stage."""
    room = await rooms()
    room.refusal = refusal
    async with serving(room):
        room.desk.epoch_over(evaluation(3))
        await room.quiet(sleeps=1)
        room.refusal = None
        room.wake()
        await room.quiet()
    assert (room.desk.failing, await room.steps()) == ("", [0])
    (event,) = room.emitter.events
    assert dict(event.attributes) == {"step": "3", "stage": "keep", "reason": reason}


async def test_without_a_lane_the_task_ends_and_nothing_has_failed(rooms: Rooms) -> None:
    """The run is over: no failure of storage."""
    room = await rooms()
    room.refusal = LaneStoppedError("it has been told to stop")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(room.desk.serve)
        room.desk.epoch_over(evaluation(3))
    with pytest.raises(LaneStoppedError):
        await room.desk.create("test")
    assert (room.log, room.value("failures_total"), list(room.emitter.events)) == ([], 0, [])


async def test_every_failure_has_a_run_stand_that_goes_on(rooms: Rooms) -> None:
    """An operator's resume while the disk is still full holds until the next failure."""
    room = await rooms(on_failure="pause")
    room.disk.full = True
    async with serving(room):
        room.desk.epoch_over(evaluation(3))
        await room.quiet(sleeps=1)
        room.wake()
        await room.quiet(sleeps=2)
        assert [word for word in room.words() if word != "failing"] == ["hold"]
        room.standing = False  # somebody lets it go on
        room.wake()
        await room.quiet(sleeps=3)
        assert [word for word in room.words() if word != "failing"] == ["hold", "hold"]
        room.disk.full = False
        room.wake()
        await room.quiet()
    assert [word for word in room.words() if word != "failing"] == ["hold", "hold", "go_on"]
    assert not room.standing
