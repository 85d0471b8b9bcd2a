from __future__ import annotations

import anyio
import pytest

from support.hanging import ASKED, hammered, peer_process, steps_per_s, time_out, training, wired
from support.hanging_child import Footprint, Manner, footprint
from tolaria.config import ControlSettings

pytestmark = pytest.mark.anyio

IN_A_ROW, AT_ONCE = 1000, 500
METHODS = {"tamiyo": ("EvaluateEpoch", "EvaluateStep"), "kasmina": ("ExportSeedStates", "ApplyCommand")}


async def settled(before: Footprint) -> Footprint:
    """What this process holds once it is as before, or after ten seconds."""
    with anyio.move_on_after(10):
        while await footprint() != before:
            await anyio.sleep(0.01)
    return await footprint()


async def test_thousands_of_timeouts_leave_nothing_behind_on_either_side() -> None:
    """1,000 of each peer in a row: threads, tasks, descriptors, handlers as before, and every handler was cancelled."""
    async with peer_process("hang") as child, wired(child.target, timeout_s=0.004) as peers:
        await time_out(peers, tuple(ASKED), 8)
        before = await footprint()
        theirs = await child.at_rest((await child.handlers()).footprint)
        timeouts = dict.fromkeys(METHODS, 0)

        async def in_a_row(peer: str) -> None:
            timeouts[peer] = await time_out(peers, METHODS[peer], IN_A_ROW)

        async with anyio.create_task_group() as tasks:
            for peer in METHODS:
                tasks.start_soon(in_a_row, peer)
        ended = await child.at_rest(theirs.footprint)
        assert timeouts == dict.fromkeys(METHODS, IN_A_ROW)
        assert ended.begun == ended.cancelled
        assert ended.begun >= IN_A_ROW  # where the machine is busy, some calls end before the peer has heard of them
        assert ended.footprint == theirs.footprint
        assert await settled(before) == before


async def test_hundreds_of_timeouts_at_once_leave_nothing_behind_on_either_side() -> None:
    """500 at once, over all methods, each handler begun and cancelled; a channel that is closed holds nothing."""
    async with peer_process("hang") as child:
        async with wired(child.target, timeout_s=0.05) as peers:
            await time_out(peers, tuple(ASKED), 4)
        before = await footprint()
        theirs = await child.at_rest((await child.handlers()).footprint)
        timeouts: list[int] = []

        async def once(number: int) -> None:
            timeouts.append(await time_out(peers, (tuple(ASKED)[number % len(ASKED)],), 1))

        async with wired(child.target, timeout_s=2.0, in_flight_max=AT_ONCE) as peers:
            async with anyio.create_task_group() as tasks:
                for number in range(AT_ONCE):
                    tasks.start_soon(once, number)
            ended = await child.at_rest(theirs.footprint)  # while the channel is open: closing it would cancel all
        assert sum(timeouts) == AT_ONCE
        assert ended.begun - theirs.begun == ended.cancelled - theirs.cancelled == AT_ONCE
        assert await settled(before) == before


async def step_rate(manner: Manner) -> float:
    """Steps a second of a run that asks its peers every other step; those that hang, others ask all the time."""
    control = ControlSettings(step_interval=2)
    async with peer_process(manner) as child:
        if manner == "answer":
            async with training(child.target, timeout_s=2.0, control=control) as (run, _):
                return await steps_per_s(run, after_steps=20, seconds=1.0)
        async with (
            wired(child.target, timeout_s=0.02) as others,
            hammered(others) as timeouts,
            training(child.target, timeout_s=0.02, control=control) as (run, _),
        ):
            rate = await steps_per_s(run, after_steps=20, seconds=1.0)
        assert "tolaria.tamiyo_timeout" in run.events
        assert timeouts.total() > 20
        return rate


async def test_peers_that_always_time_out_do_not_stop_training() -> None:
    """The step rate stays; how exactly is a benchmark's matter, here it must be within a tenth."""
    undisturbed = await step_rate("answer")
    assert await step_rate("hang") > undisturbed / 10
