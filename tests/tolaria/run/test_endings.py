"""Ends of a run whose caller goes away while the disk hangs."""

from __future__ import annotations

from collections.abc import Callable, Coroutine

import anyio
import pytest

from support.checkpointing import Disk
from support.runs import FakePeers, RunUnderTest, new_run, running

pytestmark = pytest.mark.anyio

ENDINGS: dict[str, Callable[[RunUnderTest], Coroutine[None, None, None]]] = {
    "stop": lambda run: run.run.stop("enough"),
    "drain": lambda run: run.run.drain(20.0),
}


@pytest.mark.parametrize("ending", list(ENDINGS))
async def test_an_end_whose_caller_goes_away_still_ends_the_run(ending: str) -> None:
    """The caller's deadline passes while the last checkpoint is being written: the lane does not stay held."""
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
