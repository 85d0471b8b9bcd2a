from __future__ import annotations

import anyio
import pytest

from support.lanes import FakeLane, small_image, started_client
from tolaria.errors import LaneError, LaneStoppedError, NoCheckpointError
from tolaria.lane.messages import (
    BatchesSkipped,
    CaptureImage,
    Command,
    Held,
    Hold,
    Release,
    SkipBatches,
)

pytestmark = pytest.mark.anyio

SKIP = SkipBatches(((1, 2),))


def holds(lane: FakeLane) -> list[Command]:
    """The holds and releases that were sent."""
    return [command for command in lane.sent if isinstance(command, (Hold, Release))]


async def test_a_command_returns_its_event() -> None:
    """The future has the event of its own command, with the step at which it took effect."""
    lane = FakeLane(answers={SkipBatches: BatchesSkipped(1)}, global_step=7)
    done = await started_client(lane).call(SKIP)
    assert (done.global_step, done.result) == (7, BatchesSkipped(1))


async def test_a_refused_command_raises_the_lanes_error() -> None:
    """The same error class with the same message, although it crossed as plain values."""
    lane = FakeLane(answers={SkipBatches: NoCheckpointError("there is none")})
    with pytest.raises(NoCheckpointError, match="there is none"):
        await started_client(lane).call(SKIP)


async def test_commands_are_answered_in_any_order() -> None:
    """Each future gets the event with its own command id."""
    lane = FakeLane()
    client = started_client(lane)
    first, second = client.submit(SKIP), client.submit(SkipBatches(()))
    one, two = lane.unanswered
    lane.answer(BatchesSkipped(2), two)
    lane.answer(BatchesSkipped(1), one)
    with anyio.fail_after(180):
        assert ((await first).result, (await second).result) == (BatchesSkipped(1), BatchesSkipped(2))


async def test_nothing_waits_for_a_lane_that_has_ended() -> None:
    """Pending commands fail when the lane ends, later ones at once."""
    lane = FakeLane()
    client = started_client(lane)
    pending = client.submit(SKIP)
    client.stop()
    with anyio.fail_after(180):
        with pytest.raises(LaneStoppedError):
            await pending
        with pytest.raises(LaneStoppedError):
            await client.call(SKIP)


async def test_too_many_commands_are_refused() -> None:
    """The lane's refusal to queue reaches the caller as an error, not as an exception of `submit`."""

    class FullLane(FakeLane):
        def send(self, command_id: int, command: Command) -> None:
            raise LaneError("256 commands are queued")

    with pytest.raises(LaneError, match="256 commands are queued"):
        await started_client(FullLane()).call(SKIP)


async def test_an_image_for_a_caller_that_went_away_is_released() -> None:
    """The lane captures it all the same; nothing keeps its memory leased."""
    lane = FakeLane()
    client = started_client(lane)
    with anyio.move_on_after(0.01):
        await client.call(CaptureImage())
    (command_id,) = lane.unanswered
    captured = lane.captured(small_image(0))
    lane.answer(captured, command_id)
    await anyio.wait_all_tasks_blocked()
    with pytest.raises(KeyError):
        lane.images.take(captured.image_id)


async def test_the_lane_goes_on_when_the_last_holder_releases_it() -> None:
    """Two holders: one hold, and one release after both have let go."""
    lane = FakeLane()
    client = started_client(lane)
    client.hold("run")
    client.hold("rollback")
    client.release("run")
    assert holds(lane) == [Hold(1)]
    client.release("rollback")
    assert holds(lane) == [Hold(1), Release()]


async def test_holding_twice_is_holding_once() -> None:
    """One release ends the hold, however often it was asked for."""
    lane = FakeLane()
    client = started_client(lane)
    client.hold("run")
    client.hold("run")
    client.release("run")
    assert holds(lane) == [Hold(1), Release()]


async def test_only_a_holder_can_release_the_lane() -> None:
    """A release without a hold does nothing, held for others or not."""
    lane = FakeLane()
    client = started_client(lane)
    client.release("rollback")
    client.hold("run")
    client.release("rollback")
    assert holds(lane) == [Hold(1)]


async def test_the_lane_is_held_once_it_has_answered_the_newest_hold() -> None:
    """An answer to an earlier hold, released since, does not count."""
    lane = FakeLane(holds=False)
    client = started_client(lane)
    client.hold("run")
    client.release("run")
    client.hold("run")
    assert not client.mark_held(Held(0, 1))
    assert not client.is_held
    assert client.mark_held(Held(0, 2))
    client.hold("rollback")
    assert client.held.is_set()
    client.release("run")
    client.release("rollback")
    assert not client.is_held
    client.hold("run")
    assert not client.held.is_set()


async def test_holders_are_known() -> None:
    """Whether one, or any other, wants the lane held."""
    client = started_client(FakeLane())
    client.hold("run")
    assert client.held_for("run")
    assert not client.held_for("rollback")
    assert client.held_for_others("rollback")
    assert not client.held_for_others("run")


async def test_a_restore_can_be_forbidden_until_it_changes_live_state() -> None:
    """The lane decides under one lock; a command that is over cannot be forbidden any more."""
    lane = FakeLane()
    client = started_client(lane)
    future = client.submit(SKIP)
    assert client.forbid_restore(future)
    lane.copying = True
    assert not client.forbid_restore(client.submit(SKIP))
