from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_UNSPECIFIED, RollbackTier
from tolaria.errors import PeerTimeoutError, RestoreAbandonedError
from tolaria.journal.rows import RollbackRow
from tolaria.rollback.budget import RollbackBudgets
from tolaria.rollback.coordinator import Clocks, RollbackCoordinator
from tolaria.rollback.orders import Ending, RestoreOrder, RestoreOutcome, RollbackRequest
from tolaria.rollback.participants import Call, RollbackOrder, Seat, Stance
from tolaria.rollback.phases import Phase

pytestmark = pytest.mark.anyio

Work = Callable[[RestoreOrder], Awaitable[RestoreOutcome]]
SHORT = RollbackBudgets(fast_s=0.2, full_s=0.2)
LONG = RollbackBudgets(fast_s=60.0, full_s=60.0)
REQUEST = RollbackRequest("r1", ROLLBACK_TIER_UNSPECIFIED, None, 50, "loss exploded")
DONE = RestoreOutcome(40, "d", "d", 1.0)


@dataclass(frozen=True)
class Yes:
    accepted: bool = True
    detail: str = "fine"


class Peer:
    """Agrees to everything, but never answers a call in `silent`; notes each call, and each that was cancelled."""

    def __init__(self, silent: set[Call] | None = None, *, polite: bool = True) -> None:
        self.silent = silent or set()
        self.polite = polite
        self.calls: list[tuple[Call, float]] = []
        self.cancelled: list[Call] = []

    async def prepare(self, order: RollbackOrder, /) -> Yes:
        return await self._answer(Call.PREPARE, order)

    async def commit(self, order: RollbackOrder, /) -> Yes:
        return await self._answer(Call.COMMIT, order)

    async def confirm(self, order: RollbackOrder, /) -> Yes:
        return await self._answer(Call.CONFIRM, order)

    async def abort(self, order: RollbackOrder, /) -> Yes:
        return await self._answer(Call.ABORT, order)

    async def _answer(self, call: Call, order: RollbackOrder) -> Yes:
        self.calls.append((call, order.timeout_s))
        if call not in self.silent:
            return Yes()
        try:
            with anyio.move_on_after(order.timeout_s if self.polite else None):
                await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            self.cancelled.append(call)
            raise
        raise PeerTimeoutError("peer", "late")


class Lane:
    """Has a point at step 40 and does what `work` says."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.finds = True

    async def locate(self, tier: RollbackTier.ValueType, at_or_before: int | None, /) -> int | None:
        if not self.finds:
            await anyio.sleep_forever()
        return 40

    async def restore(self, order: RestoreOrder, /) -> RestoreOutcome:
        return await self.work(order)


class House:
    """A coordinator with Tamiyo, Kasmina and a lane."""

    def __init__(self, work: Work, *, budgets: RollbackBudgets, tamiyo: Peer | None = None) -> None:
        self.tamiyo = tamiyo or Peer()
        self.kasmina = Peer()
        self.lane = Lane(work)
        self.rows: list[RollbackRow] = []
        self.slots: list[tuple[Phase, str, int, int, int]] = []
        self.coordinator = RollbackCoordinator(
            [Seat("tamiyo", self.tamiyo), Seat("kasmina", self.kasmina)],
            self.lane,
            run_id="run",
            budgets=budgets,
            on_slot=lambda *slot: self.slots.append(slot),
            record=self._record,
            clocks=Clocks(),
        )

    async def _record(self, row: RollbackRow) -> None:
        await anyio.lowlevel.checkpoint()
        self.rows.append(row)


async def never(_order: RestoreOrder) -> RestoreOutcome:
    """A lane in a step without end."""
    await anyio.sleep_forever()
    raise AssertionError("forever has ended")


async def test_a_lane_that_does_not_come_to_a_fence_is_given_up_at_the_deadline() -> None:
    """The wait is cancelled, the copy is forbidden from then on, peers abort, and the board shows the deadline."""
    seen: list[RestoreOrder] = []

    async def stuck(order: RestoreOrder) -> RestoreOutcome:
        seen.append(order)
        return await never(order)

    house = House(stuck, budgets=SHORT)
    started_s = time.monotonic()
    outcome = await house.coordinator.roll_back(REQUEST)
    assert outcome.ending is Ending.DEADLINE_EXCEEDED
    assert isinstance(outcome.error, RestoreAbandonedError)
    assert seen[0].expired()
    assert seen[0].refuses()
    assert 0 <= seen[0].deadline_s - started_s - 0.2 < 0.2
    assert [call for call, _ in house.kasmina.calls] == [Call.PREPARE, Call.COMMIT, Call.ABORT]
    assert house.slots[-1] == (Phase.DEADLINE, "r1", 40, int(seen[0].deadline_s * 1e9), ROLLBACK_TIER_FAST)
    assert [row.outcome for row in house.rows] == ["deadline_exceeded"]
    assert outcome.latency_ms >= 200


async def test_a_lane_that_notices_the_deadline_itself_has_missed_it() -> None:
    """RestoreAbandonedError from the lane is a missed deadline, not a failure of another kind."""

    async def abandoned(_order: RestoreOrder) -> RestoreOutcome:
        raise RestoreAbandonedError("reading the checkpoint")

    outcome = await House(abandoned, budgets=LONG).coordinator.roll_back(REQUEST)
    assert outcome.ending is Ending.DEADLINE_EXCEEDED


async def test_a_copy_that_was_granted_in_time_is_waited_for() -> None:
    """The deadline passes while the lane copies: the live state has changed, so the outcome is what came of that."""
    expired = anyio.Event()

    async def copies(order: RestoreOrder) -> RestoreOutcome:
        assert not order.refuses()
        while not order.expired():
            await anyio.sleep(0.005)
        expired.set()
        await anyio.sleep(0.02)
        return DONE

    house = House(copies, budgets=SHORT)
    outcome = await house.coordinator.roll_back(REQUEST)
    assert expired.is_set()
    assert (outcome.ending, outcome.restored_step) == (Ending.RESTORED, 40)
    assert house.slots[-1][0] is Phase.IDLE


async def test_looking_for_a_point_is_bounded_too() -> None:
    """A disk that does not answer costs no more than the budget."""
    house = House(never, budgets=SHORT)
    house.lane.finds = False
    outcome = await house.coordinator.roll_back(REQUEST)
    assert outcome.ending is Ending.DEADLINE_EXCEEDED
    assert 200 <= outcome.latency_ms < 5000
    assert house.slots[-1][0] is Phase.DEADLINE
    assert house.tamiyo.calls == []


@pytest.mark.parametrize("polite", [True, False])
async def test_a_silent_peer_costs_its_own_share_only(polite: bool) -> None:
    """It is cut off at its share, asked no more, and the others and the lane still have theirs."""

    async def restore(order: RestoreOrder) -> RestoreOutcome:
        assert not order.refuses()
        return DONE

    house = House(restore, budgets=RollbackBudgets(fast_s=1.0), tamiyo=Peer({Call.PREPARE}, polite=polite))
    outcome = await house.coordinator.roll_back(REQUEST)
    assert outcome.ending is Ending.RESTORED
    assert outcome.coordinated
    ((call, timeout_s),) = house.tamiyo.calls
    assert call is Call.PREPARE
    assert timeout_s == pytest.approx(0.3)
    assert house.tamiyo.cancelled == ([] if polite else [Call.PREPARE])
    assert outcome.votes[0].stance is Stance.SILENT
    assert 300 <= outcome.votes[0].latency_ms < 3000
    assert [call for call, _ in house.kasmina.calls] == [Call.PREPARE, Call.COMMIT, Call.CONFIRM]


async def test_a_share_is_for_all_calls_together() -> None:
    """What prepare and commit took is missing at the next call; with nothing left there is no call."""

    async def restore(order: RestoreOrder) -> RestoreOutcome:
        assert not order.refuses()
        return DONE

    budgets = RollbackBudgets(fast_s=10.0, shares={"tamiyo": 0.005, "kasmina": 0.3, "tolaria": 0.5})
    house = House(restore, budgets=budgets, tamiyo=Peer({Call.COMMIT}))
    outcome = await house.coordinator.roll_back(REQUEST)
    calls = dict(house.tamiyo.calls)
    assert calls[Call.PREPARE] == pytest.approx(0.05)
    assert 0 < calls[Call.COMMIT] < calls[Call.PREPARE]
    timeouts_s = [timeout_s for _, timeout_s in house.kasmina.calls]
    assert timeouts_s == sorted(timeouts_s, reverse=True)
    assert outcome.coordinated


async def cancelled_in(house: House, inside: anyio.Event) -> None:
    """Roll back in a scope that is cancelled once `inside` is set."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(house.coordinator.roll_back, REQUEST)
        await inside.wait()
        tasks.cancel_scope.cancel()


async def test_a_cancelled_rollback_is_taken_back_and_recorded() -> None:
    """Cancelled before the copy: the lane may not copy any more, peers abort, and the journal says aborted."""
    inside = anyio.Event()
    orders: list[RestoreOrder] = []

    async def stuck(order: RestoreOrder) -> RestoreOutcome:
        orders.append(order)
        inside.set()
        return await never(order)

    house = House(stuck, budgets=LONG)
    await cancelled_in(house, inside)
    assert orders[0].refuses()
    assert house.kasmina.calls[-1][0] is Call.ABORT
    assert house.slots[-1][0] is Phase.ABORTED
    assert [row.outcome for row in house.rows] == ["aborted"]
    repeated = await house.coordinator.roll_back(REQUEST)
    assert (repeated.ending, repeated.restored_step) == (Ending.ABORTED, -1)


async def test_a_rollback_cancelled_while_copying_is_seen_through() -> None:
    """Cancelled after the grant: what the copy brought is waited for and recorded as restored."""
    inside = anyio.Event()
    finished = False

    async def copies(order: RestoreOrder) -> RestoreOutcome:
        nonlocal finished
        assert not order.refuses()
        inside.set()
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        finished = True
        return DONE

    house = House(copies, budgets=LONG)
    await cancelled_in(house, inside)
    assert finished
    assert [(row.outcome, row.restored_step) for row in house.rows] == [("restored", 40)]
    assert house.slots[-1][0] is Phase.IDLE


class ThreadedLane:
    """A lane in a thread of its own, which asks for its copy this much before the deadline."""

    def __init__(self, early_s: float) -> None:
        self.early_s = early_s
        self.copied = False
        self.threads: list[threading.Thread] = []

    async def restore(self, order: RestoreOrder) -> RestoreOutcome:
        loop, done = asyncio.get_running_loop(), anyio.Event()

        def work() -> None:
            while time.monotonic() < order.deadline_s - self.early_s:
                pass
            self.copied = not order.refuses()
            loop.call_soon_threadsafe(done.set)

        self.threads.append(threading.Thread(target=work))
        self.threads[0].start()
        await done.wait()
        if not self.copied:
            raise RestoreAbandonedError("about to copy")
        return DONE


async def test_a_thread_and_a_deadline_always_agree() -> None:
    """With a lane that copies right around the deadline, a copy is made if and only if it is reported."""
    for attempt in range(40):
        lane = ThreadedLane((attempt - 20) * 1e-4)
        house = House(lane.restore, budgets=RollbackBudgets(fast_s=0.01))
        outcome = await house.coordinator.roll_back(REQUEST)
        for thread in lane.threads:
            await anyio.to_thread.run_sync(thread.join)
        assert outcome.ending is (Ending.RESTORED if lane.copied else Ending.DEADLINE_EXCEEDED)


async def test_a_rollback_cancelled_while_it_is_confirmed_stands() -> None:
    """The state is back by then: recorded as restored, and nobody is told to abort."""

    async def restore(order: RestoreOrder) -> RestoreOutcome:
        assert not order.refuses()
        return DONE

    house = House(restore, budgets=LONG, tamiyo=Peer({Call.CONFIRM}))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(house.coordinator.roll_back, REQUEST)
        while Call.CONFIRM not in dict(house.tamiyo.calls):
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    assert [(row.outcome, row.restored_step, row.coordinated) for row in house.rows] == [("restored", 40, 0)]
    assert Call.ABORT not in dict(house.tamiyo.calls)


async def test_a_task_torn_down_while_the_lane_copies_has_failed() -> None:
    """Cancelled past every scope, nobody learns what the copy came to: that is said, not guessed."""
    inside = anyio.Event()

    async def copies(order: RestoreOrder) -> RestoreOutcome:
        assert not order.refuses()
        inside.set()
        return await never(order)

    house = House(copies, budgets=LONG)
    task = asyncio.ensure_future(house.coordinator.roll_back(REQUEST))
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [row.outcome for row in house.rows] == ["failed"]
    assert "which state is live now is not known" in house.rows[0].reason
