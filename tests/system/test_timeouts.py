from __future__ import annotations

import anyio
import pytest

from support.hanging import CALLS, calling, connected, count_timeouts, peer_process, steps_per_s, training
from support.hanging_child import Behaviour, Footprint, footprint
from tolaria.config import ControlSettings

pytestmark = pytest.mark.anyio

IN_A_ROW, AT_ONCE = 1000, 500
NOTHING = Footprint(0, 0, 0)
METHODS = {"tamiyo": ("EvaluateEpoch", "EvaluateStep"), "kasmina": ("ExportSeedStates", "ApplyCommand")}


async def at_rest() -> Footprint:
    """Returns the resources of this process once they stay the same for a while: what is closed is gone by then."""
    found = await footprint()
    with anyio.fail_after(60):
        while True:
            await anyio.sleep(0.5)
            if (now := await footprint()) == found:
                return found
            found = now


async def more_than(before: Footprint) -> Footprint:
    """Returns what this process has beyond `before` once that is nothing, or after ten seconds.

    It may have less: what earlier connections leave behind is closed some time after them.
    """
    with anyio.move_on_after(10):
        while (await footprint()).beyond(before) != NOTHING:
            await anyio.sleep(0.01)
    return (await footprint()).beyond(before)


async def test_thousands_of_timeouts_leak_nothing_on_either_side() -> None:
    """After 1,000 in a row for each peer: threads, tasks and descriptors as before, and every handler cancelled."""
    async with peer_process("hang") as child, connected(child.target, timeout_s=0.004) as peers:
        await count_timeouts(peers, tuple(CALLS), 8)
        before = await at_rest()
        child_before = await child.idle((await child.handlers()).footprint)
        timeouts = dict.fromkeys(METHODS, 0)

        async def in_a_row(peer: str) -> None:
            timeouts[peer] = await count_timeouts(peers, METHODS[peer], IN_A_ROW)

        async with anyio.create_task_group() as tasks:
            for peer in METHODS:
                tasks.start_soon(in_a_row, peer)
        child_after = await child.idle(child_before.footprint)
        assert timeouts == dict.fromkeys(METHODS, IN_A_ROW)
        assert child_after.begun == child_after.cancelled
        assert child_after.begun >= IN_A_ROW  # on a busy machine some calls end before they reach the peer
        assert child_after.footprint.beyond(child_before.footprint) == NOTHING
        assert await more_than(before) == NOTHING


async def test_hundreds_of_simultaneous_timeouts_leak_nothing_on_either_side() -> None:
    """500 simultaneous calls over all methods: each handler was begun and cancelled; a closed channel holds nothing."""
    async with peer_process("hang") as child:
        async with connected(child.target, timeout_s=0.05) as peers:
            await count_timeouts(peers, tuple(CALLS), 4)
        before = await at_rest()
        child_before = await child.idle((await child.handlers()).footprint)
        timeouts: list[int] = []

        async def once(number: int) -> None:
            timeouts.append(await count_timeouts(peers, (tuple(CALLS)[number % len(CALLS)],), 1))

        async with connected(child.target, timeout_s=2.0, in_flight_max=AT_ONCE) as peers:
            async with anyio.create_task_group() as tasks:
                for number in range(AT_ONCE):
                    tasks.start_soon(once, number)
            # Measured before the channel closes, which would cancel all calls.
            child_after = await child.idle(child_before.footprint)
        assert sum(timeouts) == AT_ONCE
        assert child_after.begun - child_before.begun == child_after.cancelled - child_before.cancelled == AT_ONCE
        assert await more_than(before) == NOTHING


async def step_rate(behaviour: Behaviour) -> float:
    """Measures a run that calls its peers every other step; other clients call hanging peers continuously."""
    control = ControlSettings(step_interval=2)
    async with peer_process(behaviour) as child:
        if behaviour == "answer":
            async with training(child.target, timeout_s=2.0, control=control) as (run, _):
                return await steps_per_s(run, after_steps=20, seconds=1.0)
        async with (
            connected(child.target, timeout_s=0.02) as others,
            calling(others) as timeouts,
            training(child.target, timeout_s=0.02, control=control) as (run, _),
        ):
            rate = await steps_per_s(run, after_steps=20, seconds=1.0)
        assert "tolaria.tamiyo_timeout" in run.events
        assert timeouts.total() > 20
        return rate


async def test_peers_that_always_time_out_do_not_stop_training() -> None:
    """The step rate is at least a tenth of the undisturbed one; a benchmark measures it exactly."""
    undisturbed = await step_rate("answer")
    assert await step_rate("hang") > undisturbed / 10
