from __future__ import annotations

from contextlib import AsyncExitStack

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import TaskGroup

from tolaria.errors import CallRefusedError
from tolaria.resilience.gate import CallGate

pytestmark = pytest.mark.anyio


class Holder:
    """A call that has, or waits for, a place until it is told to end."""

    def __init__(self, gate: CallGate, tasks: TaskGroup, timeout_s: float = 10.0) -> None:
        self.inside = anyio.Event()
        self.refused = ""
        self.over = anyio.Event()
        self._end = anyio.Event()
        self._gate, self._timeout_s = gate, timeout_s
        tasks.start_soon(self._hold)

    async def _hold(self) -> None:
        try:
            async with self._gate.place("Ask", self._timeout_s):
                self.inside.set()
                await self._end.wait()
        except CallRefusedError as error:
            self.refused = error.detail
        self.over.set()

    async def end(self) -> None:
        """Give the place back."""
        self._end.set()
        await self.over.wait()


async def settled() -> None:
    """Until every task has gone as far as it can."""
    for _ in range(10):
        await anyio.lowlevel.checkpoint()


async def test_no_more_than_the_places_are_in_flight() -> None:
    """Whoever comes later waits, and gets the place that comes free, first come first served."""
    gate = CallGate("tamiyo", in_flight_max=2, waiting_max=8)
    async with anyio.create_task_group() as tasks:
        holders = [Holder(gate, tasks) for _ in range(4)]
        await settled()
        assert [h.inside.is_set() for h in holders] == [True, True, False, False]
        assert gate.in_flight == 2
        await holders[1].end()
        await settled()
        assert [h.inside.is_set() for h in holders] == [True, True, True, False]
        for holder in (holders[0], holders[2], holders[3]):
            await holder.end()
    assert gate.in_flight == 0


async def test_one_more_than_may_wait_is_refused_at_once() -> None:
    """The queue is bounded; the refusal says by what."""
    gate = CallGate("tamiyo", in_flight_max=1, waiting_max=1)
    async with anyio.create_task_group() as tasks:
        first, second = Holder(gate, tasks), Holder(gate, tasks)
        await settled()
        with pytest.raises(CallRefusedError, match="tamiyo: Ask refused: 1 calls are in flight and 1 wait"):
            async with gate.place("Ask", 10.0):
                raise AssertionError("there is no place")
        await first.end()
        await second.end()


async def test_a_wait_ends_with_its_time_and_leaves_the_queue() -> None:
    """Nobody waits longer than its own deadline, and whoever gave up takes no place later."""
    gate = CallGate("tamiyo", in_flight_max=1, waiting_max=1)
    async with anyio.create_task_group() as tasks:
        first = Holder(gate, tasks)
        await settled()
        late = Holder(gate, tasks, timeout_s=0.01)
        await late.over.wait()
        assert late.refused == "Ask refused: none of 1 calls in flight ended within 10 ms"
        await first.end()
        async with gate.place("Ask", 0.0):
            assert gate.in_flight == 1


async def test_a_waiter_that_is_cancelled_leaves_no_trace() -> None:
    """The place that it would have had goes to the next."""
    gate = CallGate("tamiyo", in_flight_max=1, waiting_max=2)
    async with anyio.create_task_group() as tasks:
        first = Holder(gate, tasks)
        await settled()
        async with anyio.create_task_group() as cancelled:
            Holder(gate, cancelled)
            await settled()
            cancelled.cancel_scope.cancel()
        last = Holder(gate, tasks)
        await first.end()
        await settled()
        assert last.inside.is_set()
        await last.end()


async def test_a_drain_waits_for_what_is_in_flight_and_refuses_the_rest() -> None:
    """Calls in flight end in peace; those that wait, and new ones, are refused."""
    gate = CallGate("tamiyo", in_flight_max=1, waiting_max=8)
    drained = anyio.Event()

    async def drain() -> None:
        await gate.drain(10.0)
        drained.set()

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            first, waiting = Holder(gate, tasks), Holder(gate, tasks)
            await settled()
            tasks.start_soon(drain)
            await settled()
            assert not drained.is_set()
            with pytest.raises(CallRefusedError, match="the channel is closing"):
                async with gate.place("Ask", 10.0):
                    raise AssertionError("the gate is closed")
            await first.end()
            await drained.wait()
            await waiting.over.wait()
            assert waiting.refused == "Ask refused: the channel is closing"


async def test_a_drain_has_an_end() -> None:
    """A call that does not end is left after the time that it was given."""
    gate = CallGate("tamiyo", in_flight_max=1, waiting_max=0)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(gate.place("Ask", 1.0))
        with anyio.fail_after(5):
            await gate.drain(0.01)
        assert gate.in_flight == 1
