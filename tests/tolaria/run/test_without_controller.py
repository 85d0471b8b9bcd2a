from __future__ import annotations

from pathlib import Path

import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from support.runs import FakePeers, new_run, running, train_to
from tolaria.config import ControlSettings
from tolaria.rollback.protocol import Rollback
from tolaria.values.optimization import OPERATOR

pytestmark = pytest.mark.anyio
OFF = ControlSettings(
    enabled=False, step_interval=1, boundary_budget_ms=0.001, tamiyo_budget_ms=0.001, boundary_slack_ms=0.001
)


async def test_a_run_without_a_controller_asks_nothing(tmp_path: Path) -> None:
    """It trains to its end, with checkpoints; no peer is asked, and no boundary can be late."""
    peers = FakePeers()
    sections: dict[str, object] = {"checkpoint": {}, "state": {"dir": str(tmp_path / "state")}}
    run = new_run(peers, job="SlotJob", control=OFF, sections=sections, epochs=3)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
        assert run.checkpointing.saved_step == run.status.global_step > 0
    assert (peers.states, peers.step_states, peers.applied) == ([], [], [])
    assert run.status.boundaries_over_budget == 0
    assert "control.enabled is off" in run.status.tamiyo_answer
    assert run.run.status().conservative_reasons == []


async def test_a_rollback_needs_no_peers() -> None:
    """One on request restores the state, and counts as coordinated: there is no participant that it left out."""
    run = new_run(FakePeers(), job="GatedJob", control=OFF, sections={"rollback": {"every_steps": 1}})
    async with running(run):
        await train_to(run, 3)
        rollback = Rollback(ROLLBACK_TIER_FAST, 2, "r", OPERATOR, rollback_id="1")
        done = await run.run.roll_back(rollback)
        assert (done.restored_step, done.state_digest) == (2, done.expected_digest)
        assert done.coordinated


async def test_the_same_training_with_and_without_a_controller_that_changes_nothing() -> None:
    """Losses and evaluations are equal: a controller that is not asked costs and changes nothing."""
    found = []
    for control in (OFF, None):
        run = new_run(FakePeers(), control=control, epochs=2, deterministic=True)
        async with running(run):
            await run.until(lambda run=run: run.state == "FINISHED")  # type: ignore[misc]
        assert run.status.last_epoch is not None
        found.append((run.status.training_loss, run.status.last_epoch.evaluation))
    assert found[0] == found[1]
