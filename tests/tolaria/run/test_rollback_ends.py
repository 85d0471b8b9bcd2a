"""What is so when a rollback is over, before training goes on: also where it failed, or nobody waited for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_CONSERVATIVE, EMERGENCY_LEVEL_HALT, ROLLBACK_TIER_FAST
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.errors import InvalidFieldError, RestoreAbandonedError, RestoreUnprovenError, WrongStateError
from tolaria.rollback.orders import RestoreOrder, RestoreOutcome, RollbackOutcome
from tolaria.rollback.participants import RollbackOrder, Seat
from tolaria.training.recovery.operators import RecoveryDesk
from tolaria.rollback.protocol import Rollback, RollbackTies
from tolaria.training.verdicts import RateCut, Retreat

pytestmark = pytest.mark.anyio

# Budgets that a busy machine keeps to.
BY_ORDER = {"automatic": False, "every_steps": 3, "fast_budget_s": 10.0, "snapshots_max": 1000}


def endless(**rollback: object) -> RunUnderTest:
    """A run that goes on until it is stopped."""
    return new_run(FakePeers(), epochs=10**6, sections={"rollback": {**BY_ORDER, **rollback}})


def fast(target_step: int | None = None, **fields: Any) -> Asked:
    """Back to a snapshot."""
    return Rollback(ROLLBACK_TIER_FAST, target_step, "odd", "operator", **fields)


def tie(run: RunUnderTest, change: Callable[[RollbackTies], RollbackTies]) -> None:
    """Put something else in place of one of the desk's ties."""
    desk = run.recovery
    desk._ties = change(desk._ties)


def durations(run: RunUnderTest) -> float | None:
    """How many have been observed."""
    labels = {"tier": "fast", "outcome": "restored"}
    return run.sample("tolaria.rollback.duration_seconds_count", labels)


async def test_a_proof_that_fails_halts_and_nothing_is_resumed_from_what_was_undone() -> None:
    """Not one step is trained on a state that is not what was captured; the error says that it is live."""
    run = endless()
    restorer: Any = run.recovery._coordinator._restorer
    restore = restorer.restore

    async def unequal(order: RestoreOrder, /) -> RestoreOutcome:
        restored: RestoreOutcome = await restore(order)
        return replace(restored, state_digest="of something else")

    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        await run.run.checkpoint("to be undone")
        restorer.restore = unequal
        with pytest.raises(RestoreUnprovenError, match="the live state was overwritten"):
            await run.run.roll_back(fast(6))
        await run.until(lambda: run.state == "HALTED" and run.core.lane.is_held)
        assert run.module.global_step == 6
        assert "rollback_unproven" in run.status.state_reason
        assert run.safety.controller.state.level == EMERGENCY_LEVEL_HALT
        checkpoints = run.storage.checkpoints
        assert await anyio.to_thread.run_sync(checkpoints.restore_points) == ()
        assert run.status.rollbacks == 0
        with pytest.raises(WrongStateError, match="roll back once more"):
            await run.run.checkpoint("of what nobody has captured")
        restorer.restore = restore
        await run.run.roll_back(fast(3))
        assert (await run.run.checkpoint("of what was captured")).global_step == 3


async def test_a_missed_deadline_is_told_while_the_lane_still_stands() -> None:
    """So that, where it halts, no step is trained in between."""
    run, stood = endless(fast_budget_s=0.1), []

    async def never(_order: RestoreOrder, /) -> RestoreOutcome:
        await anyio.sleep_forever()
        raise AssertionError("forever is over")

    def missed(_reason: str) -> None:
        stood.append(run.core.lane.held_for("rollback"))

    tie(run, lambda ties: replace(ties, missed=missed))
    restorer: Any = run.recovery._coordinator._restorer
    restorer.restore = never
    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        with pytest.raises(RestoreAbandonedError):
            await run.run.roll_back(fast())
        assert stood == [True]
        await run.run.stop("enough")


@pytest.mark.parametrize("request_id", ["one", "long" * 32])
async def test_a_request_that_comes_again_is_one_rollback(request_id: str) -> None:
    """Its caller went away: the repeat waits for the same, or gets its outcome; another one has another id."""
    run, asked = endless(), fast(6, request_id=request_id)
    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        with anyio.CancelScope() as gone:
            gone.cancel()
            await run.run.roll_back(asked)
        assert run.recovery.running
        outcome = await run.run.roll_back(asked)
        assert await run.run.roll_back(asked) is outcome
        assert run.status.rollbacks == 1
        assert 0 < len(outcome.rollback_id) <= 64
        with pytest.raises(InvalidFieldError, match="request_id"):
            await run.run.roll_back(replace(asked, target_step=3))
        await run.run.stop("enough")


class Peer:
    """A participant that agrees to everything and notes that it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    async def prepare(self, _order: RollbackOrder, /) -> Any:
        """Agree; so with all four."""
        self.asked += 1
        return SimpleNamespace(accepted=True, detail="")

    commit = confirm = abort = prepare


async def test_after_the_end_nobody_is_asked_to_go_back() -> None:
    """Not by an emergency, nor by the judge; whoever asks for it is told why not."""
    peers, peer = FakePeers(), Peer()
    peers.seats = [Seat("tamiyo", peer), Seat("kasmina", peer)]
    run = new_run(peers, epochs=1, sections={"rollback": BY_ORDER})
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
        run.safety.controller.escalate(EMERGENCY_LEVEL_CONSERVATIVE, "odd", "kasmina")
        run.recovery.retreat(Retreat(ROLLBACK_TIER_FAST, "odd", 3, RateCut(0.5, 3)), target_step=3)
        assert not run.recovery.running
        with pytest.raises(WrongStateError, match="the run has ended"):
            run.recovery.begin(fast())
    assert peer.asked == 0


async def test_a_rollback_that_no_step_follows_has_its_time_all_the_same() -> None:
    """Because another one begins before the first step, or because the run stays paused."""
    run, counts = endless(), []
    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        again: list[Any] = []

        def at_once(_outcome: RollbackOutcome) -> None:
            counts.append(durations(run))
            again.append(run.recovery.begin(fast(3)))
            counts.append(durations(run))

        run.recovery.begin(fast(6), at_once)
        await run.until(lambda: bool(again))
        await again[0].over.wait()
        assert counts == [None, 1]
        await run.until(lambda: durations(run) == 2)
        await run.run.pause("look")
        await run.run.roll_back(fast(3))
        assert durations(run) == 3
        run.run.resume("on")
        await run.until(lambda: run.status.global_step > 10)
        assert durations(run) == 3
        await run.run.stop("enough")


async def test_without_a_target_it_goes_to_the_newest_stable_point_as_the_list_shows() -> None:
    """What came after the last healthy step is in the list, but not stable, and not gone back to by itself."""
    run = endless()
    desk = RecoveryDesk(run.run, run.journal, run.status.snapshots)
    async with running(run):
        await run.until(lambda: run.status.global_step > 20)
        run.health.healthy_step = 8
        await run.run.pause("look")
        points = (await desk.restore_points()).restore_points
        assert {point.global_step for point in points if point.stable} <= {0, 3, 6}
        assert max(point.global_step for point in points) > 8
        asked = admin.TriggerRollbackRequest(request_id="a", reason="odd")
        assert (await desk.trigger_rollback(asked)).restored_step == 6
        await run.run.stop("enough")


async def test_the_log_tells_which_batches_are_left_out() -> None:
    """By epoch and place in it, with how many there are in all."""
    sections: dict[str, object] = {
        "rollback": {"automatic": True, "every_steps": 2, "warmup_steps": 5, "fast_budget_s": 10.0}
    }
    options = {"spoilt": [[3, 4]], "by": 1e4}
    run = new_run(FakePeers(), job="SpoiltJob", sections=sections, epochs=4, options=options)
    with capture_logs() as logs:
        async with running(run):
            await run.until(lambda: run.state == "FINISHED")
    (line,) = [line for line in logs if line["event"] == "batches_left_out"]
    assert (3, 4) in line["epochs_and_places"]
    assert line["count"] == len(line["epochs_and_places"])
    assert line["count_in_all"] == len(run.module.skipped_batches)


async def test_checkpoints_that_hang_while_they_are_superseded_do_not_hold_the_lane() -> None:
    """The rollback ends and training goes on; that they were not is told."""
    run = endless()

    async def never(_step: int) -> None:
        await anyio.sleep_forever()

    tie(run, lambda ties: replace(ties, supersede=never))
    with capture_logs() as logs:
        async with running(run):
            await run.until(lambda: run.status.global_step > 10)
            with anyio.fail_after(10):
                await run.run.roll_back(fast(3))
            await run.until(lambda: run.status.global_step > 10)
            await run.run.stop("enough")
    assert [line["after_step"] for line in logs if line["event"] == "checkpoints_not_superseded"] == [3]
