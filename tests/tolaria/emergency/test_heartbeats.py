from __future__ import annotations

import threading

import anyio
import pytest

from support.emergency import Stage
from tolaria.emergency.heartbeats import Heartbeats

pytestmark = pytest.mark.anyio


def beats(stage: Stage) -> tuple[int, int]:
    """The loop's and the lane's, as the sentinel reads them."""
    state = stage.other.read("tolaria")
    return state.heartbeat_ns, state.lane_heartbeat_ns


async def moves(stage: Stage) -> tuple[bool, bool]:
    """Which of both hearts has moved after the loop has beaten three times more."""
    before = after = beats(stage)
    seen = {before[0]}
    while len(seen) < 4:
        await anyio.sleep(0.001)
        after = beats(stage)
        seen.add(after[0])
    return after[0] != before[0], after[1] != before[1]


async def test_the_loop_beats_for_a_lane_that_rests(stage: Stage) -> None:
    """Before it has begun, between epochs and while it is held; not while it works."""
    hearts = Heartbeats(stage.participant)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hearts.beat, 0.001)
        assert await moves(stage) == (True, True)
        with hearts.lane_works():
            assert await moves(stage) == (True, False)
            with hearts.lane_rests():
                assert await moves(stage) == (True, True)
            assert await moves(stage) == (True, False)
        assert await moves(stage) == (True, True)
        tasks.cancel_scope.cancel()


async def test_the_lane_beats_for_itself_from_its_thread(stage: Stage) -> None:
    """Also when the event loop does not."""
    hearts = Heartbeats(stage.participant)
    before = beats(stage)
    thread = threading.Thread(target=hearts.lane_beat)
    thread.start()
    thread.join()
    after = beats(stage)
    assert (after[0] == before[0], after[1] > before[1]) == (True, True)


async def test_work_and_its_resumption_begin_with_a_beat(stage: Stage) -> None:
    """The time at rest must not count as silence of the work that follows."""
    hearts = Heartbeats(stage.participant)
    first = beats(stage)[1]
    with hearts.lane_works():
        second = beats(stage)[1]
        with hearts.lane_rests():
            pass
        assert first < second < beats(stage)[1]
