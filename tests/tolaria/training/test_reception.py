from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest

from leyline.v1.admin_service_pb2 import AdjustLearningRateRequest
from support.jobs import GatedJob
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.training.fences import FenceReport
from tolaria.training.reports import EpochReport, Report

pytestmark = pytest.mark.anyio


def held_back(run: RunUnderTest) -> Callable[[], None]:
    """From now on the lane's reports wait, as they do for a busy event loop; what lets all of them come, in a frame."""
    link, deliver = run.parts.link, run.parts.link._deliver
    link._deliver = lambda: None  # type: ignore[method-assign] # on purpose

    def let_come() -> None:
        link._deliver = deliver  # type: ignore[method-assign] # as it was
        deliver()

    return let_come


def has(run: RunUnderTest, kind: type[Report]) -> bool:
    """Whether a report of this kind waits to be taken."""
    return any(isinstance(report, kind) for report in run.parts.link._box._reports)


async def test_a_fence_after_an_epochs_end_is_not_undone_by_the_epochs_report() -> None:
    """Both come in one frame: the rates and adjustments that the status shows are the fence's, the newer ones."""
    peers = FakePeers()
    run = new_run(peers, job="GatedJob", epochs=10**6)
    assert isinstance(run.job, GatedJob)
    async with running(run), anyio.create_task_group() as tasks:
        await run.until(lambda: run.state == "RUNNING")
        let_come = held_back(run)
        run.job.passes.release(8)  # the first epoch's
        await run.until(lambda: has(run, EpochReport))
        tasks.start_soon(
            run.loop.adjust_rate,
            AdjustLearningRateRequest(request_id="1", reason="calm", factor=0.5, expires_after_steps=100),
        )
        await run.until(lambda: has(run, FenceReport))
        let_come()
        await run.until(lambda: run.progress.epoch == 2)  # whose first microbatch gets no pass: nothing newer is told
        status = run.loop.status()
        assert status.learning_rates == {"host": 0.025}
        assert [told.request_id for told in status.adjustments] == ["1"]
        assert run.metrics.registry.get_sample_value("tolaria.lr_controller.current_lr", {"group": "host"}) == 0.025
        assert status.validation_loss == peers.states[0].validation_loss > 0
        run.job.passes.release(1000)
        await run.loop.stop("enough")
