from __future__ import annotations

import anyio
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FULL
from support.disks import FailingDisk
from support.runs import FakePeers, new_run, running
from tolaria.errors import RestoreAbandonedError
from tolaria.journal.rows import RollbackRow
from tolaria.signals import RollbackState
from tolaria.training.fence_desk import FenceDesk
from tolaria.training.recovery.keeping import kept_image
from tolaria.training.recovery.rollbacks import Asked

pytestmark = pytest.mark.anyio

BACK = Asked(ROLLBACK_TIER_FULL, None, "back", "operator")


@pytest.mark.parametrize("halts", [True, False])
async def test_a_disk_that_reads_too_slowly_costs_the_rollback_and_nothing_else(halts: bool) -> None:
    """Given up in time, the live state bit-equal, told on the board, in metrics and incidents; HALT where set."""
    disk = FailingDisk()
    sections: dict[str, object] = {
        "checkpoint": {"every_epochs": 0},
        "rollback": {"automatic": False, "full_budget_s": 0.3, "halt_on_deadline": halts},
    }
    run = new_run(FakePeers(), epochs=10**6, sections=sections, files=disk)
    async with running(run):
        await run.until(lambda: run.progress.global_step > 10)
        row = await run.loop.checkpoint("before")
        await run.loop.pause("nothing shall change")
        before = await digest(run.parts.link.desk)
        disk.reading.clear()
        disk.gate.clear()
        with anyio.fail_after(5), pytest.raises(RestoreAbandonedError):
            await run.loop.roll_back(BACK)
        assert disk.reading.is_set()
        shown = await anyio.to_thread.run_sync(run.board.read_rollback)
        assert shown is not None
        assert (shown.state, shown.target_step) == (RollbackState.DEADLINE, row.global_step)
        assert run.metrics.registry.get_sample_value("tolaria.rollback.deadline_exceeded_total") == 1
        (told,) = await anyio.to_thread.run_sync(run.parts.ground.storage.journal.rows, RollbackRow)
        assert (told.outcome, told.restored_step) == ("deadline_exceeded", -1)
        disk.gate.set()
        assert await digest(run.parts.link.desk) == before
        if halts:
            await run.until(lambda: run.state == "HALTED")
            assert "rollback_deadline_missed" in run.progress.state_reason
            assert run.loop.rollbacks.completed == 0
        else:
            assert run.state == "PAUSED"
            back = await run.loop.roll_back(Asked(ROLLBACK_TIER_FULL, None, "again", "operator"))
            assert back.state_digest == back.expected_digest == row.digest
            run.loop.resume("on")
            await run.until(lambda: run.rig.global_step > row.global_step + 10)
        await run.loop.stop("enough")


async def digest(desk: FenceDesk) -> str:
    """Of the live state."""
    with await kept_image(desk) as image:
        return await anyio.to_thread.run_sync(lambda: image.seal().total)
