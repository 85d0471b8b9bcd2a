from __future__ import annotations

import anyio
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FULL
from support.disks import FailingDisk
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.errors import RestoreAbandonedError
from tolaria.journal.rows import RollbackRow
from tolaria.lane.messages import CaptureImage, ImageCaptured
from tolaria.rollback.protocol import Rollback
from tolaria.signals import RollbackState

pytestmark = pytest.mark.anyio


async def live_digest(run: RunUnderTest) -> str:
    """Returns the digest of the live state at the next step boundary."""
    captured = (await run.core.lane.call(CaptureImage())).result
    assert isinstance(captured, ImageCaptured)
    with run.core.lane.images.take(captured.image_id) as image:
        return await anyio.to_thread.run_sync(lambda: image.seal().total)


def full_rollback() -> Rollback:
    """Returns a rollback to the newest checkpoint."""
    return Rollback(ROLLBACK_TIER_FULL, None, "back", "operator")


async def test_a_disk_that_reads_too_slowly_makes_a_rollback_miss_its_deadline() -> None:
    """The live state is bit-equal; board, metrics and journal show it; a sound run goes on."""
    disk = FailingDisk()
    sections: dict[str, object] = {
        "checkpoint": {"every_epochs": 0},
        "rollback": {"automatic": False, "full_budget_s": 0.3},
    }
    run = new_run(FakePeers(), epochs=10**6, sections=sections, files=disk)
    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        row = await run.run.checkpoint("before")
        await run.run.pause("no change from here on")
        before = await live_digest(run)
        disk.reading.clear()
        disk.gate.clear()
        with anyio.fail_after(180), pytest.raises(RestoreAbandonedError):
            await run.run.roll_back(full_rollback())
        assert disk.reading.is_set()
        shown = await anyio.to_thread.run_sync(run.board.read_rollback)
        assert shown is not None
        assert (shown.state, shown.target_step) == (RollbackState.DEADLINE, row.global_step)
        assert run.sample("tolaria.rollback.deadline_exceeded_total") == 1
        (recorded,) = await anyio.to_thread.run_sync(run.storage.journal.rows, RollbackRow)
        assert (recorded.outcome, recorded.restored_step) == ("deadline_exceeded", -1)
        disk.gate.set()
        assert await live_digest(run) == before
        assert run.state == "PAUSED"
        back = await run.run.roll_back(full_rollback())
        assert back.state_digest == back.expected_digest == row.digest
        await run.run.resume("on")
        await run.until(lambda: run.module.global_step > row.global_step + 10)
        await run.run.stop("enough")
