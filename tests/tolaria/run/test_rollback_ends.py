"""The end of a rollback: what holds before training continues, also after a failure or without a waiting caller."""

from __future__ import annotations

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_CONSERVATIVE, EMERGENCY_LEVEL_HALT, ROLLBACK_TIER_FAST
from support.admin import serving_run, stub_of
from support.rollbacks import FakeParticipant
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.emergency import Trigger
from tolaria.errors import RestoreAbandonedError, RestoreUnprovenError, WrongStateError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.rollback.protocol import Rollback
from tolaria.run.restorer import LaneRestorer
from tolaria.run.verdicts import RateCut, Retreat
from tolaria.values.lineage import Lineage

pytestmark = pytest.mark.anyio

# Budgets that a busy machine keeps.
ON_REQUEST = {"automatic": False, "every_steps": 3, "fast_budget_s": 10.0, "snapshots_max": 1000}


def endless(**rollback: object) -> RunUnderTest:
    """Returns a run that does not end by itself."""
    return new_run(FakePeers(), epochs=10**6, sections={"rollback": {**ON_REQUEST, **rollback}})


def fast(target_step: int | None = None) -> Rollback:
    """Returns an operator's rollback to a snapshot."""
    return Rollback(ROLLBACK_TIER_FAST, target_step, "odd", "operator")


def durations(run: RunUnderTest) -> float | None:
    """Returns how many durations of rollbacks have been observed."""
    labels = {"tier": "fast", "outcome": "restored"}
    return run.sample("tolaria.rollback.duration_seconds_count", labels)


async def test_a_failed_proof_halts_and_supersedes_what_was_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is trained on a state other than the captured one, until a further rollback restores one."""
    run = endless()
    restore = LaneRestorer.restore

    async def unequal(self: LaneRestorer, rollback: Rollback, /) -> None:
        await restore(self, rollback)
        rollback.state_digest = "of something else"

    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        await run.run.checkpoint("to be undone")
        with monkeypatch.context() as patch:
            patch.setattr(LaneRestorer, "restore", unequal)
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
            await run.run.checkpoint("of an unproven state")
        await run.run.roll_back(fast(3))
        assert (await run.run.checkpoint("of a proven state")).global_step == 3


async def test_a_missed_deadline_is_reported_while_the_lane_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """So no step is trained between the missed deadline and a halt that follows from it."""
    run, held = endless(fast_budget_s=0.1), []

    async def never(_self: LaneRestorer, _rollback: Rollback, /) -> None:
        await anyio.sleep_forever()

    def missed(_trigger: Trigger, _detail: str) -> None:
        held.append(run.core.lane.held_for("rollback"))

    monkeypatch.setattr(run.safety, "trigger", missed)
    monkeypatch.setattr(LaneRestorer, "restore", never)
    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        with pytest.raises(RestoreAbandonedError):
            await run.run.roll_back(fast())
        assert held == []  # an operator's missed rollback halts nothing
        run.recovery.retreat(Retreat("odd", run.status.global_step, (), RateCut(0.5, 3)))
        await run.until(lambda: not run.recovery.running)
        assert held == [True]
        await run.run.stop("enough")


async def test_a_rollback_goes_on_when_its_caller_is_cancelled() -> None:
    """It is carried out once, and counted."""
    run = endless()
    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await run.run.roll_back(fast(6))
        assert run.recovery.running
        await run.until(lambda: not run.recovery.running)
        assert run.status.rollbacks == 1
        await run.run.stop("enough")


async def test_no_rollback_begins_after_the_end_of_the_run() -> None:
    """Neither an emergency nor health begins one, participants are not called, and an operator gets an error."""
    peers, peer = FakePeers(), FakeParticipant()
    peers.participants = {"tamiyo": peer, "kasmina": peer}
    run = new_run(peers, epochs=1, sections={"rollback": ON_REQUEST})
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
        run.safety.controller.escalate(EMERGENCY_LEVEL_CONSERVATIVE, "odd", "kasmina")
        run.recovery.retreat(Retreat("odd", 3, (), RateCut(0.5, 3)))
        assert not run.recovery.running
        with pytest.raises(WrongStateError, match="the run has ended"):
            run.recovery.begin(fast())
    assert peer.calls == []


async def test_the_duration_is_observed_also_when_no_step_follows() -> None:
    """It ends with the restore when another rollback begins before the first step, or the run stays paused."""
    run, counts = endless(), []
    async with running(run):
        await run.until(lambda: run.status.global_step > 10)

        def begin_another(_rollback: Rollback) -> None:
            counts.append(durations(run))
            run.recovery.begin(fast(3))
            counts.append(durations(run))

        run.recovery.begin(fast(6), begin_another)
        await run.until(lambda: run.status.rollbacks == 2)
        assert counts == [0, 1]
        await run.until(lambda: durations(run) == 2)
        await run.run.pause("look")
        await run.run.roll_back(fast(3))
        assert durations(run) == 3
        await run.run.resume("on")
        await run.until(lambda: run.status.global_step > 10)
        assert durations(run) == 3
        await run.run.stop("enough")


async def test_the_default_target_is_the_newest_proven_restore_point() -> None:
    """Points that no sound losses have followed are listed as not stable, and are no default target."""
    run = endless(every_steps=1)
    async with running(run), serving_run(run) as channel:
        stub = stub_of(channel)
        await run.until(lambda: run.status.global_step > 20)
        await run.run.pause("look")
        points = (await stub.ListRestorePoints(admin.ListRestorePointsRequest())).restore_points
        proven = [point.global_step for point in points if point.stable]
        assert max(proven) < max(point.global_step for point in points)
        assert all(point.HasField("created_at") for point in points)
        back = await stub.TriggerRollback(admin.TriggerRollbackRequest(request_id="a", reason="odd"))
        assert (back.restored_step, back.chosen, back.attempt) == (
            max(proven),
            "the newest proven one: the snapshot",
            2,
        )
        assert 0 < back.restored_ms <= back.latency_ms
        await run.run.stop("enough")


async def test_the_log_names_the_skipped_batches() -> None:
    """By epoch and place in the epoch, with the number of all skipped batches."""
    rollback = {"automatic": True, "every_steps": 2, "fast_budget_s": 10.0}
    sections: dict[str, object] = {"rollback": rollback, "health": {"skip_extreme": False}}
    options = {"corrupted": [[3, 4], [3, 5]], "factor": 1e4}
    run = new_run(FakePeers(), job="CorruptedDataJob", sections=sections, epochs=4, options=options)
    with capture_logs() as logs:
        async with running(run):
            await run.until(lambda: run.state == "FINISHED")
    (line,) = [line for line in logs if line["event"] == "batches_left_out"]
    assert (3, 4) in line["epochs_and_places"]
    assert line["count"] == len(line["epochs_and_places"])
    assert line["count_in_all"] == len(run.module.skipped)


async def test_a_journal_that_hangs_while_superseding_does_not_hold_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rollback ends, training continues, and the log says that the checkpoints were not superseded."""
    run = endless()

    async def never(_self: AsyncJournal, _lineage: Lineage, _detail: str) -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr(AsyncJournal, "follow", never)
    with capture_logs() as logs:
        async with running(run):
            await run.until(lambda: run.status.global_step > 10)
            with anyio.fail_after(180):
                await run.run.roll_back(fast(3))
            await run.until(lambda: run.status.global_step > 10)
            await run.run.stop("enough")
    (line,) = [line for line in logs if line["event"] == "checkpoints_not_superseded"]
    assert line["detail"] == "rolled back to step 3: the journal did not answer"
