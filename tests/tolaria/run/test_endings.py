"""How a run leaves when whoever ends it goes away, or the disk hangs, or a rollback is still under way."""

from __future__ import annotations

from collections.abc import Callable, Coroutine

import anyio
import pytest

from support.checkpoint_room import Disk
from support.runs import FakePeers, RunUnderTest, new_run, running

pytestmark = pytest.mark.anyio

ENDINGS: dict[str, Callable[[RunUnderTest], Coroutine[None, None, None]]] = {
    "stop": lambda run: run.run.stop("enough"),
    "drain": lambda run: run.run.drain(20.0),
}


@pytest.mark.parametrize("ending", list(ENDINGS))
async def test_an_ending_that_nobody_waits_for_any_more_still_ends_the_run(ending: str) -> None:
    """The client's deadline passes while the last checkpoint is being written: the lane is not left standing."""
    disk = Disk()
    disk.gate.clear()
    run = new_run(FakePeers(), epochs=10**6, sections={"checkpoint": {"every_epochs": 10**6}}, files=disk)
    async with running(run):
        await run.until(lambda: run.status.global_step > 3)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ENDINGS[ending], run)
            await run.until(lambda: run.core.lane.is_held)
            tasks.cancel_scope.cancel()
        await run.until(lambda: run.state == "FINISHED")
        disk.gate.set()
