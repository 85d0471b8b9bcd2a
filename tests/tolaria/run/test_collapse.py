"""Runs whose validation accuracy collapses, and which roll back automatically."""

from __future__ import annotations

import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT
from leyline.v1.state_pb2 import SystemStatePacket
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.journal.rows import RollbackRow
from tolaria.run.verdicts import Proceed

pytestmark = pytest.mark.anyio

EPOCHS, STEPS = 8, 8
ENDED = {"FINISHED", "FAILED", "HALTED"}


class CheckpointingPeers(FakePeers):
    """Peers that have a checkpoint of the validated state made at every boundary of `run`, unless that is None."""

    def __init__(self) -> None:
        super().__init__(self._checkpoint)
        self.run: RunUnderTest | None = None

    async def _checkpoint(self, _state: SystemStatePacket) -> None:
        if self.run is not None:
            await self.run.run.checkpoint("a good epoch")


def collapsing_run(
    *epochs: int,
    times: int = 1,
    checkpoints: bool = True,
) -> tuple[RunUnderTest, CheckpointingPeers]:
    """Returns a run whose accuracy collapses `times` times in each of these epochs, and its peers."""
    rollback = {"automatic": True, "full_budget_s": 20.0, "automatic_max": 2}
    peers = CheckpointingPeers()
    run = new_run(
        peers,
        job="CollapsingJob",
        sections={"rollback": rollback, "checkpoint": {"every_epochs": 0}},
        epochs=EPOCHS,
        deterministic=True,
        options={"collapses": list(epochs), "times": times, "gated": []},
    )
    peers.run = run if checkpoints else None
    return run, peers


async def rollbacks_of(run: RunUnderTest) -> list[tuple[str, int]]:
    """Returns tier and restored step of each rollback in the journal."""
    rows = await anyio.to_thread.run_sync(run.storage.journal.rows, RollbackRow)
    return [(row.tier, row.restored_step) for row in rows]


async def finished(run: RunUnderTest) -> None:
    """Runs to the end."""
    async with running(run):
        await run.until(lambda: run.state in ENDED)


@pytest.mark.parametrize("first", [4, 5, EPOCHS - 2])
async def test_a_collapse_is_undone_from_disk(first: int) -> None:
    """Three epochs in a row, also the last ones: one full rollback to before the first, and every epoch is counted."""
    run, _ = collapsing_run(first, first + 1, first + 2)
    async with running(run):
        await run.until(lambda: run.state in ENDED)
        assert await rollbacks_of(run) == [("full", (first - 1) * STEPS)]
    assert run.state == "FINISHED"
    assert run.module.global_step == EPOCHS * STEPS
    assert (run.status.rollbacks, run.job.collapsed) == (1, 3)
    assert run.status.last_epoch is not None
    assert run.status.last_epoch.epoch == EPOCHS
    levels = [e.attributes["emergency_level"] for e in run.emitter.events if e.name == "tolaria.emergency.escalated"]
    assert levels == ["conservative"]


async def test_worse_evaluations_that_are_not_undone_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has the epoch and the reason; the run goes on."""
    run, _ = collapsing_run()
    monkeypatch.setattr(run.health, "epoch", lambda _epoch, *, rolling_back: Proceed("worse than all before"))
    with capture_logs() as logs:
        await finished(run)
    found = [(line["epoch"], line["reason"]) for line in logs if line["event"] == "evaluations_worse"]
    assert found == [(number, "worse than all before") for number in range(1, EPOCHS + 1)]
    assert run.state == "FINISHED"


async def test_two_bad_evaluations_are_no_collapse() -> None:
    """Nothing is undone."""
    run, _ = collapsing_run(4, 5)
    await finished(run)
    assert (run.state, run.status.rollbacks, run.job.collapsed) == ("FINISHED", 0, 2)


async def test_a_collapse_that_rollbacks_do_not_repair_halts() -> None:
    """The budget of automatic rollbacks is spent, or no older checkpoint is left."""
    run, _ = collapsing_run(4, 5, 6, times=10)
    await finished(run)
    assert run.state == "HALTED"
    assert run.safety.controller.state.level == EMERGENCY_LEVEL_HALT
    assert run.status.rollbacks in {1, 2}


async def test_without_a_checkpoint_a_collapse_takes_a_snapshot() -> None:
    """A proven one from before the first bad evaluation is as good: the run is not halted."""
    run, _ = collapsing_run(4, 5, 6, checkpoints=False)
    await finished(run)
    assert (run.state, run.status.rollbacks) == ("FINISHED", 1)
    assert "tolaria.rollback.restore_failed" in run.events
