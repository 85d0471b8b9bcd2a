from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN
from support.checkpointing import CheckpointingFactory, epoch_done, serving
from tolaria.errors import CheckpointWriteError, LaneError, LaneStoppedError, StateUnsupportedError, TolariaError
from tolaria.journal.rows import FaultRow

pytestmark = pytest.mark.anyio

COOLDOWN_S = 30.0


@pytest.fixture
def make_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckpointingFactory]:
    """Makes checkpointing with given settings, and closes its storage at the end."""
    factory = CheckpointingFactory(tmp_path, monkeypatch)
    yield factory
    factory.close()


@pytest.mark.parametrize(("on_failure", "held"), [("pause", ["hold", "resume"]), ("continue", [])])
async def test_a_full_disk_is_reported_and_retried(
    make_parts: CheckpointingFactory, on_failure: str, held: list[str]
) -> None:
    """The run is held or not as set; a fresh state is tried until there is space; then checkpoints go on as before."""
    parts = await make_parts(on_failure=on_failure, retry_s=7.0)
    parts.disk.full = True
    async with serving(parts):
        parts.step = 10
        parts.checkpointing.on_epoch(epoch_done(10))
        await parts.until_idle(sleeps=1)
        assert "ENOSPC" in parts.checkpointing.failing
        parts.step = 11
        parts.wake()
        await parts.until_idle(sleeps=2)
        assert await parts.steps() == []
        parts.disk.full = False
        parts.step = 12
        parts.wake()
        await parts.until_idle()
        assert (parts.checkpointing.failing, await parts.steps()) == ("", [12])
        parts.step = 20
        parts.checkpointing.on_epoch(epoch_done(20))
        await parts.until_idle()
    assert await parts.steps() == [12, 20]
    assert parts.slept_s == [7.0, 7.0]
    assert parts.observer.failed == [(10, "write", "ENOSPC"), (11, "write", "ENOSPC")]
    assert len(parts.observer.written) == 2
    assert parts.run.actions == held
    assert len({reason for _, reason in parts.run.log}) <= 1
    assert parts.run.changes == 2
    faults = await anyio.to_thread.run_sync(parts.storage.journal.rows, FaultRow)
    assert [(fault.kind, fault.global_step) for fault in faults] == [("checkpoint_failed", 10)]


async def test_the_metric_of_a_held_state_survives_the_retries(make_parts: CheckpointingFactory) -> None:
    """A held run's checkpoint is written late with the figure of its validation."""
    parts = await make_parts()
    parts.disk.full = True
    async with serving(parts):
        parts.step = 11
        parts.checkpointing.on_epoch(epoch_done(10))
        await parts.until_idle(sleeps=1)
        parts.checkpointing.on_step(10)  # events arrive a little behind the lane
        parts.disk.full = False
        parts.wake()
        await parts.until_idle()
    assert [(row.global_step, row.metric) for row in await parts.rows()] == [(11, 0.5)]


async def test_epochs_do_not_hurry_retries(make_parts: CheckpointingFactory) -> None:
    """Nothing more is captured until the retry is due."""
    parts = await make_parts(on_failure="continue")
    parts.disk.full = True
    async with serving(parts):
        for step in (10, 20, 30):
            parts.step = step
            parts.checkpointing.on_epoch(epoch_done(step))
            await parts.until_idle(sleeps=1)
    assert parts.captures == 1


async def test_the_breaker_opens_and_a_later_checkpoint_closes_it(make_parts: CheckpointingFactory) -> None:
    """Three failures open it; a success while it cools down lets training go on, and one after that closes it."""
    parts = await make_parts()
    parts.disk.full = True
    async with serving(parts):
        parts.step = 1
        parts.checkpointing.on_epoch(epoch_done(1))
        for sleeps in (1, 2, 3):
            await parts.until_idle(sleeps=sleeps)
            parts.wake()
        await parts.until_idle(sleeps=4)
        assert parts.breaker.state == CIRCUIT_STATE_OPEN
        parts.disk.full = False
        parts.wake()
        await parts.until_idle(sleeps=5)
        assert (parts.breaker.state, parts.checkpointing.failing) == (CIRCUIT_STATE_OPEN, "")
        assert parts.run.actions.count("resume") == 1
        parts.now_s = COOLDOWN_S
        parts.wake()
        await parts.until_idle()
    assert parts.breaker.state == CIRCUIT_STATE_CLOSED
    assert (len(parts.slept_s), len(await parts.steps())) == (5, 2)


async def test_an_operators_checkpoint_counts_as_a_failure_and_as_a_success(make_parts: CheckpointingFactory) -> None:
    """The caller gets the error; the run is held and resumed as with any other; the sleeping retry does no more."""
    parts = await make_parts()
    parts.disk.full = True
    async with serving(parts):
        with pytest.raises(CheckpointWriteError, match="ENOSPC"):
            await parts.checkpointing.create("test")
        await parts.until_idle(sleeps=1)
        parts.disk.full = False
        parts.step = 5
        assert (await parts.checkpointing.create("test")).global_step == 5
        assert (parts.checkpointing.failing, parts.run.actions) == ("", ["hold", "resume"])
        parts.step = 6
        parts.checkpointing.on_epoch(epoch_done(6))  # while the retry still sleeps
        parts.wake()
        await parts.until_idle()
    assert await parts.steps() == [5, 6]


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (StateUnsupportedError("group/0/x", "an object"), "group/0/x: an object"),
        (LaneError("256 commands are waiting"), "256 commands are waiting"),
    ],
)
async def test_a_state_that_cannot_be_captured_is_a_failure(
    make_parts: CheckpointingFactory, refusal: TolariaError, reason: str
) -> None:
    """The task goes on, and observers get the stage."""
    parts = await make_parts()
    parts.refusal = refusal
    async with serving(parts):
        parts.checkpointing.on_epoch(epoch_done(3))
        await parts.until_idle(sleeps=1)
        parts.refusal = None
        parts.wake()
        await parts.until_idle()
    assert (parts.checkpointing.failing, await parts.steps()) == ("", [0])
    assert parts.observer.failed == [(3, "keep", reason)]


async def test_without_a_lane_the_task_ends_and_nothing_has_failed(make_parts: CheckpointingFactory) -> None:
    """The run is over: that is no failure of storage."""
    parts = await make_parts()
    parts.refusal = LaneStoppedError("the run has ended")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(parts.checkpointing.serve)
        parts.checkpointing.on_epoch(epoch_done(3))
    with pytest.raises(LaneStoppedError):
        await parts.checkpointing.create("test")
    assert (parts.run.log, parts.observer.failed, parts.checkpointing.failing) == ([], [], "")


async def test_every_failure_holds_a_run_that_is_training(make_parts: CheckpointingFactory) -> None:
    """A run that an operator resumes while the disk is full trains until the next failure."""
    parts = await make_parts(on_failure="pause")
    parts.disk.full = True
    async with serving(parts):
        parts.checkpointing.on_epoch(epoch_done(3))
        await parts.until_idle(sleeps=1)
        parts.wake()
        await parts.until_idle(sleeps=2)
        assert parts.run.actions == ["hold"]
        parts.run.held = False  # an operator resumes it
        parts.wake()
        await parts.until_idle(sleeps=3)
        assert parts.run.actions == ["hold", "hold"]
        parts.disk.full = False
        parts.wake()
        await parts.until_idle()
    assert parts.run.actions == ["hold", "hold", "resume"]
