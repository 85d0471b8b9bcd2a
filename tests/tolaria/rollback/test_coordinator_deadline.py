from __future__ import annotations

import asyncio
import threading
import time

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from support.rollbacks import (
    GENEROUS,
    CoordinatedParts,
    FakeParticipant,
    FakeRestorer,
    budget_of,
    new_rollback,
    restored,
)
from tolaria.config import RollbackSettings
from tolaria.errors import RestoreAbandonedError, StateMismatchError
from tolaria.rollback.protocol import Call, Ending, Rollback, VoteOutcome
from tolaria.signals import RollbackState

pytestmark = pytest.mark.anyio

SHORT = budget_of(0.2, 0.2)


def hanging(settings: RollbackSettings) -> CoordinatedParts:
    """A coordinator whose lane never reaches a step boundary."""
    parts = CoordinatedParts(settings=settings)
    parts.restorer.work = parts.restorer.hangs
    return parts


async def test_a_lane_that_reaches_no_step_boundary_is_given_up_at_the_deadline() -> None:
    """The wait is cancelled, the copy is forbidden from then on, peers get an abort, and the board shows DEADLINE."""
    parts = hanging(SHORT)
    rollback = await parts.run()
    assert rollback.ending is Ending.DEADLINE_EXCEEDED
    assert isinstance(rollback.error, RestoreAbandonedError)
    assert parts.restorer.forbidden
    assert not parts.restorer.begin_copy()
    assert parts.kasmina.called == [Call.PREPARE, Call.COMMIT, Call.ABORT]
    assert rollback.began_s + 0.2 <= rollback.deadline_s < rollback.began_s + 100  # of a busy machine
    deadline_ns = int(rollback.deadline_s * 1e9)
    assert parts.board.shown[-1] == (RollbackState.DEADLINE, "r1", 40, deadline_ns, ROLLBACK_TIER_FAST)
    assert [row.outcome for row in parts.journal.rollbacks] == ["deadline_exceeded"]
    assert rollback.latency_ms >= 200


async def test_a_lane_that_abandons_the_restore_has_missed_the_deadline() -> None:
    """RestoreAbandonedError from the lane is a missed deadline, not a failure of another kind."""

    async def abandons(_rollback: Rollback) -> None:
        raise RestoreAbandonedError("reading the checkpoint")

    rollback = await CoordinatedParts(restorer=FakeRestorer(abandons)).run()
    assert rollback.ending is Ending.DEADLINE_EXCEEDED


async def test_a_copy_that_began_in_time_is_waited_for() -> None:
    """The deadline passes while the lane copies: live state has changed, so the outcome is that of the copy."""

    async def copies_slowly(rollback: Rollback) -> None:
        assert parts.restorer.begin_copy()
        while time.monotonic() < rollback.deadline_s + 0.05:
            await anyio.sleep(0.005)
        restored(rollback)

    parts = CoordinatedParts(settings=SHORT, restorer=FakeRestorer(copies_slowly))
    rollback = await parts.run()
    assert rollback.restore_begun
    assert (rollback.ending, rollback.restored_step) == (Ending.RESTORED, 40)
    assert parts.board.states[-1] is RollbackState.IDLE


async def test_the_search_for_a_restore_point_is_bounded() -> None:
    """A disk that does not answer costs no more than the budget."""
    parts = CoordinatedParts(settings=SHORT)
    parts.restorer.finds = False
    rollback = await parts.run()
    assert rollback.ending is Ending.DEADLINE_EXCEEDED
    assert 200 <= rollback.latency_ms < 5000
    assert parts.board.states[-1] is RollbackState.DEADLINE
    assert parts.log == []


@pytest.mark.parametrize("punctual", [True, False])
async def test_a_silent_peer_costs_only_its_own_share(punctual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut off at its share and not called again; the others and the lane still have theirs."""
    if punctual:  # on a busy machine its own timeout, which ends the call first, may be late
        monkeypatch.setattr("tolaria.rollback.coordinator._GRACE_S", 5.0)
    tamiyo = FakeParticipant({Call.PREPARE: None}, punctual=punctual)
    parts = CoordinatedParts(settings=budget_of(1.0, 1.0), tamiyo=tamiyo)
    rollback = await parts.run()
    assert (rollback.ending, rollback.coordinated) == (Ending.RESTORED, True)
    ((call, request),) = tamiyo.calls
    assert call is Call.PREPARE
    assert request.timeout_s == pytest.approx(0.3)
    assert tamiyo.cancelled == ([] if punctual else [Call.PREPARE])
    assert rollback.votes[0].outcome is VoteOutcome.SILENT
    assert 300 <= rollback.votes[0].latency_ms < 3000
    assert parts.kasmina.called == [Call.PREPARE, Call.COMMIT, Call.CONFIRM]


async def test_a_share_is_for_all_calls_together() -> None:
    """Time that prepare took is missing at commit; without any left there is no call."""
    tamiyo = FakeParticipant({Call.COMMIT: None})
    parts = CoordinatedParts(settings=budget_of(1.0, 1.0), tamiyo=tamiyo)
    rollback = await parts.run()
    timeouts_s = {call: request.timeout_s for call, request in tamiyo.calls}
    assert timeouts_s[Call.PREPARE] == pytest.approx(0.3)
    assert 0 < timeouts_s[Call.COMMIT] < timeouts_s[Call.PREPARE]
    kasmina_s = [request.timeout_s for _, request in parts.kasmina.calls]
    assert kasmina_s == sorted(kasmina_s, reverse=True)
    assert rollback.coordinated


async def run_until_cancelled(parts: CoordinatedParts, inside: anyio.Event) -> Rollback:
    """Carries a rollback out in a scope that is cancelled once `inside` is set."""
    rollback = new_rollback()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(parts.run, rollback)
        await inside.wait()
        tasks.cancel_scope.cancel()
    return rollback


async def test_a_rollback_cancelled_before_the_copy_is_aborted() -> None:
    """The lane may not copy any more, peers get an abort, and the journal says aborted."""
    inside = anyio.Event()

    async def hangs(rollback: Rollback) -> None:
        inside.set()
        await parts.restorer.hangs(rollback)

    parts = CoordinatedParts(settings=GENEROUS, restorer=FakeRestorer(hangs))
    rollback = await run_until_cancelled(parts, inside)
    assert parts.restorer.forbidden
    assert parts.kasmina.called[-1] is Call.ABORT
    assert parts.board.states[-1] is RollbackState.ABORTED
    assert (rollback.ending, rollback.restored_step) == (Ending.ABORTED, -1)
    assert [row.outcome for row in parts.journal.rollbacks] == ["aborted"]


async def test_a_rollback_cancelled_during_the_copy_is_completed() -> None:
    """The copy is waited for and recorded as restored."""
    inside = anyio.Event()
    finished = False

    async def copies(rollback: Rollback) -> None:
        nonlocal finished
        assert parts.restorer.begin_copy()
        inside.set()
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        finished = True
        restored(rollback)

    parts = CoordinatedParts(settings=GENEROUS, restorer=FakeRestorer(copies))
    await run_until_cancelled(parts, inside)
    assert finished
    assert [(row.outcome, row.restored_step) for row in parts.journal.rollbacks] == [("restored", 40)]
    assert parts.board.states[-1] is RollbackState.IDLE


async def test_a_restore_that_fails_while_the_caller_is_cancelled_has_failed() -> None:
    """Its error is recorded: the live state is known to be unchanged."""
    inside = anyio.Event()

    async def fails(_rollback: Rollback) -> None:
        assert parts.restorer.begin_copy()
        inside.set()
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        raise StateMismatchError(["parameter/w: missing"])

    parts = CoordinatedParts(settings=GENEROUS, restorer=FakeRestorer(fails))
    rollback = await run_until_cancelled(parts, inside)
    assert rollback.ending is Ending.FAILED
    assert isinstance(rollback.error, StateMismatchError)


async def test_a_rollback_cancelled_while_it_is_confirmed_is_restored() -> None:
    """The state is restored by then, and no participant gets an abort."""
    parts = CoordinatedParts(settings=GENEROUS, tamiyo=FakeParticipant({Call.CONFIRM: None}))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(parts.run)
        while Call.CONFIRM not in parts.tamiyo.called:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    rows = parts.journal.rollbacks
    assert [(row.outcome, row.restored_step, row.coordinated) for row in rows] == [("restored", 40, 0)]
    assert Call.ABORT not in parts.tamiyo.called


async def test_a_task_cancelled_directly_during_the_copy_has_failed() -> None:
    """Past every scope the copy cannot be waited for: the journal says that the live state is unknown."""
    inside = anyio.Event()

    async def copies(rollback: Rollback) -> None:
        assert parts.restorer.begin_copy()
        inside.set()
        await parts.restorer.hangs(rollback)

    parts = CoordinatedParts(settings=GENEROUS, restorer=FakeRestorer(copies))
    task = asyncio.ensure_future(parts.run())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [row.outcome for row in parts.journal.rollbacks] == ["failed"]
    assert "which state is live now is not known" in parts.journal.rollbacks[0].reason


class ThreadedRestorer(FakeRestorer):
    """Restores in a thread, which asks for its copy `early_s` before the deadline."""

    def __init__(self, early_s: float) -> None:
        super().__init__(self.in_thread)
        self.early_s = early_s
        self.copied = False
        self.threads: list[threading.Thread] = []

    async def in_thread(self, rollback: Rollback) -> None:
        loop, done = asyncio.get_running_loop(), anyio.Event()

        def copy() -> None:
            while time.monotonic() < rollback.deadline_s - self.early_s:
                pass
            self.copied = time.monotonic() < rollback.deadline_s and self.begin_copy()
            loop.call_soon_threadsafe(done.set)

        self.threads.append(threading.Thread(target=copy))
        self.threads[0].start()
        await done.wait()
        if not self.copied:
            raise RestoreAbandonedError("about to copy")
        restored(rollback)


async def test_a_thread_and_a_deadline_always_agree() -> None:
    """With a lane that copies right around the deadline, a copy is made if and only if it is reported."""
    for attempt in range(40):
        restorer = ThreadedRestorer((attempt - 20) * 1e-4)
        parts = CoordinatedParts(settings=budget_of(0.01, 0.01), restorer=restorer)
        rollback = await parts.run()
        for thread in restorer.threads:
            await anyio.to_thread.run_sync(thread.join)
        assert rollback.ending is (Ending.RESTORED if restorer.copied else Ending.DEADLINE_EXCEEDED)


@pytest.mark.parametrize("hangs", [False, True])
async def test_saving_the_state_that_is_left_is_bounded_and_no_part_of_the_budget(hangs: bool) -> None:
    """It takes longer than the fast budget, or does not end: the rollback is made, and its budget begins afterwards."""
    parts = CoordinatedParts(settings=budget_of(0.1, 0.5))

    async def slow(rollback: Rollback) -> None:
        await anyio.sleep(10**6 if hangs else 0.2)
        rollback.left_checkpoint_id = "c50"

    parts.restorer.keeping = slow
    rollback = new_rollback()
    rollback.saves_left = True
    await parts.run(rollback)
    assert rollback.ending is Ending.RESTORED
    assert rollback.boundary_s is not None
    assert rollback.deadline_s == rollback.boundary_s + 0.1
    assert rollback.kept_ms >= (500 if hangs else 200)
    assert rollback.latency_ms == pytest.approx(rollback.waited_ms + rollback.kept_ms + rollback.restored_ms)
    expected = ("", True) if hangs else ("c50", False)
    assert (rollback.left_checkpoint_id, "within 0.5 s" in rollback.left_not_kept) == expected


async def test_a_second_try_saves_nothing_again() -> None:
    """It has the checkpoint, or the reason, of the first try, and does not go to that checkpoint."""
    parts = CoordinatedParts()
    saved = list[Rollback]()

    async def saves(rollback: Rollback) -> None:
        await anyio.lowlevel.checkpoint()
        saved.append(rollback)
        rollback.left_checkpoint_id = rollback.made_checkpoint_id = "c50"

    parts.restorer.keeping = saves
    first = new_rollback()
    first.saves_left = True
    await parts.run(first)
    second = await parts.run(first.again(ROLLBACK_TIER_FAST))
    assert saved == [first]
    assert (second.left_step, second.left_checkpoint_id, second.made_checkpoint_id) == (50, "c50", "c50")
