"""Data that operators have training leave out."""

from __future__ import annotations

import json
from typing import Any, cast

import anyio.to_thread
import grpc
import grpc.aio
import pytest
import torch

from leyline.v1 import admin_service_pb2 as admin
from support.admin import serving_run, stub_of
from support.jobs import GatedJob
from support.lane_driver import DrivenLane, built
from support.lanes import FakeLane
from support.runs import FakePeers, new_run, running, train_to
from tolaria.errors import InvalidFieldError, WrongStateError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import DATA_SKIPS, CommandRow
from tolaria.lane.messages import SetSkippedRanges
from tolaria.run.data_skips import DataSkips, saved_skips
from tolaria.run.lane_client import LaneClient
from tolaria.run.observers import RunObserver
from tolaria.run.status import RunStatus
from tolaria.run.step_places import StepPlaces
from tolaria.values.training import BatchRange, EpochProgress

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")]

STREAM = "support.data_jobs:StreamJob"


def trained(*ranges: BatchRange, steps: int, **options: Any) -> list[torch.Tensor]:
    """Returns the parameters after these steps on a stream, where these batches are left out."""
    torch.set_num_threads(1)
    lane = DrivenLane(built(STREAM, deterministic=True, steps=100, evaluate_every_steps=7, options=options))
    lane.execute(SetSkippedRanges(ranges))
    lane.train_to(steps)
    return [parameter.detach().clone() for parameter in lane.module.parameters]


@pytest.mark.parametrize(("stream", "noise"), [("loader", True), ("dataset", True), ("none", False)])
def test_a_run_with_a_skip_equals_one_whose_data_never_had_it(stream: str, noise: bool) -> None:
    """Bit for bit, with dropout and a stream that draws random numbers in the process of training; else it differs."""
    # Places 3 and 4 of the first epoch, and 1 of the second one, which is the ninth batch of four samples.
    ranges = BatchRange(1, 3, 4), BatchRange(2, 1, 1)
    skipped = trained(*ranges, steps=12, stream=stream, noise=noise)
    never = trained(steps=12, stream=stream, noise=noise, left_out=[*range(12, 20), *range(32, 36)])
    with_all = trained(steps=12, stream=stream, noise=noise)
    assert all(torch.equal(a, b) for a, b in zip(skipped, never, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(skipped, with_all, strict=True))


def test_skips_are_no_part_of_the_state() -> None:
    """The digest stays; a restore keeps them; ranges are replaced as a whole."""
    lane = DrivenLane(built(STREAM, steps=100, evaluate_every_steps=7))
    lane.train_to(2)
    before = lane.digest
    with lane.capture() as image:
        lane.execute(SetSkippedRanges((BatchRange(1, 2, 5),)))
        assert lane.digest == before
        lane.restore(2, image)
    lane.train_to(3)
    assert lane.module.progress.batches == 7
    lane.execute(SetSkippedRanges(()))
    assert len(lane.module.skipped) == 0


async def test_an_operator_skips_lists_and_removes() -> None:
    """Named by steps, before and after; listed, durable, repeated safely, undone; the batches are not trained on."""
    run = new_run(FakePeers(), job="GatedJob", epochs=3)
    async with running(run), serving_run(run) as channel:
        stub = stub_of(channel)
        await train_to(run, 3)

        def request(number: int, **fields: Any) -> admin.SkipDataRequest:
            return admin.SkipDataRequest(request_id=f"s{number}", reason="bad shard", **fields)

        ahead = await stub.SkipData(request(1, from_step=5, to_step=6))
        assert [(r.epoch, r.from_batch, r.to_batch) for r in ahead.skip.ranges] == [(1, 4, 5)]
        assert (ahead.skip.batches, ahead.skip.passed, ahead.global_step) == (2, 0, 3)
        assert await stub.SkipData(request(1, from_step=5, to_step=6)) == ahead
        behind = await stub.SkipData(request(2, from_step=2))
        assert (behind.skip.passed, behind.skip.ranges[0].from_batch) == (1, 1)
        named = await stub.SkipData(request(3, epoch=2, from_batch=0, to_batch=1))
        assert (await stub.GetStatus(admin.GetStatusRequest())).data_skips == 3
        undone = await stub.SkipData(request(4, remove=named.skip.skip_id))
        assert undone.skip.HasField("removed_at")
        listed = (await stub.ListDataSkips(admin.ListDataSkipsRequest())).skips
        assert [each.skip_id for each in listed] == [named.skip.skip_id, behind.skip.skip_id, ahead.skip.skip_id]
        saved = await anyio.to_thread.run_sync(saved_skips, run.storage.journal, "run")
        assert [skip.removed_at_ns is None for skip in saved] == [True, True, False]
        await train_to(run, 5)
        assert run.module.progress.batches == 7
        assert "tolaria.data_skipped" in run.events
        assert "tolaria.data_skip_removed" in run.events
        cast("GatedJob", run.job).passes.release(1000)


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({}, "from_step", "not nothing"),
        ({"from_step": 1, "epoch": 1}, "from_step", "not from_step and to_step, epoch"),
        ({"from_step": 5, "to_step": 4}, "to_step", "less than from_step"),
        ({"from_step": 0}, "from_step", "counted from 1"),
        ({"epoch": 7, "from_batch": 4000, "to_batch": 4001}, "from_batch", "there is no batch 4000"),
        ({"from_step": 1, "to_step": 10**6}, "to_step", "at most 100000"),
        ({"epoch": 0}, "epoch", "from 1"),
        ({"epoch": 1, "from_batch": 3, "to_batch": 2}, "to_batch", "less than from_batch"),
        ({"remove": "abc"}, "remove", "no skip abc"),
    ],
)
async def test_bad_requests_are_refused_and_change_nothing(fields: dict[str, Any], field: str, words: str) -> None:
    """The message names the field."""
    run = new_run(FakePeers(), job="GatedJob")
    async with running(run), serving_run(run) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub_of(channel).SkipData(admin.SkipDataRequest(request_id="x", reason="odd", **fields))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert str(raised.value.details()).startswith(f"{field}")
        assert words in str(raised.value.details())
        assert run.run.skips.all == ()
        cast("GatedJob", run.job).passes.release(1000)


def test_skips_that_cannot_be_read_are_none(tmp_path: Any) -> None:
    """A later version may write others; the run starts, and the log says so."""
    from tolaria.journal.database import Journal

    with Journal(tmp_path / "journal") as journal:
        journal.put(CommandRow(f"{DATA_SKIPS}@run", 1, "run", DATA_SKIPS, 0, "applied", json.dumps([{"skip_id": "a"}])))
        assert saved_skips(journal, "run") == ()


def test_steps_are_not_known_before_the_job_is_built() -> None:
    """Then only batches can be named."""
    lane = LaneClient(FakeLane())
    status = RunStatus("run", "job", "", 1, 0.0)
    journal = cast("AsyncJournal", None)  # not used
    skips = DataSkips(lane, status, journal, RunObserver(), saved=(), places=StepPlaces(1))
    with pytest.raises(WrongStateError, match="not built yet"):
        skips.ranges_of_steps(1, 2)
    skips.places.begin(EpochProgress(), 0, 10)
    assert skips.ranges_of_steps(9, 12) == (BatchRange(1, 8, 9), BatchRange(2, 0, 1))


def test_what_the_run_does_not_reach_is_refused() -> None:
    """A step or an epoch after the end is a typing error; of a range that reaches beyond it, the rest is left out."""
    status = RunStatus("run", "job", "", 2, 0.0)
    skips = DataSkips(
        LaneClient(FakeLane()), status, cast("AsyncJournal", None), RunObserver(), saved=(), places=StepPlaces(1)
    )
    skips.places.begin(EpochProgress(), 0, 10)
    assert skips.ranges_of_steps(20, 25) == (BatchRange(2, 9, 9), BatchRange(3, 0, 4))
    with pytest.raises(InvalidFieldError, match="ends after epoch 2, step 21 would be in epoch 3"):
        skips.ranges_of_steps(21, 21)
    with pytest.raises(InvalidFieldError, match="there is no epoch 3"):
        skips.batches_of_epoch(3, 0, 1)
    status.steps = 15
    with pytest.raises(InvalidFieldError, match="ends after step 15, there is no step 16"):
        skips.ranges_of_steps(16, 16)
    assert skips.batches_of_epoch(3, 0, 1) == (BatchRange(3, 0, 1),)
