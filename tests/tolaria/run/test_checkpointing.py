from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from support.checkpointing import CheckpointingFactory, CheckpointingParts, epoch_done, serving
from tolaria.config import CheckpointSettings
from tolaria.errors import LaneError, LaneStoppedError
from tolaria.journal.rows import CheckpointRow
from tolaria.lane.messages import BatchesSkipped, CaptureImage
from tolaria.run import checkpointing
from tolaria.run.checkpointing import BUSY_S, best_metric, due_by_epochs, due_by_steps
from tolaria.values.evaluation import Evaluation
from tolaria.values.lineage import Lineage

pytestmark = pytest.mark.anyio


@pytest.fixture
def make_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckpointingFactory]:
    """Makes checkpointing with given settings, and closes its storage at the end."""
    factory = CheckpointingFactory(tmp_path, monkeypatch)
    yield factory
    factory.close()


# -- when checkpoints are due ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "now", "last", "due"),
    [
        (0, 100, 0, False),
        (10, 9, 0, False),
        (10, 10, 0, True),
        (10, 25, 10, True),
        (10, 19, 10, False),
        (1, 1, 1, False),
    ],
)
def test_due_by_steps(every: int, now: int, last: int, due: bool) -> None:
    """A checkpoint is due `every` steps after the last one, also when the exact step is missed; 0 is never."""
    assert due_by_steps(every, now, last) is due


@pytest.mark.parametrize(("every", "epoch", "due"), [(0, 1, False), (1, 1, True), (3, 2, False), (3, 3, True)])
def test_due_by_epochs(every: int, epoch: int, due: bool) -> None:
    """A checkpoint is due every `every` epochs; 0 is never."""
    assert due_by_epochs(every, epoch) is due


async def test_checkpoints_at_and_between_epoch_ends(make_parts: CheckpointingFactory) -> None:
    """Each is of the step where it fell due; nothing else is written; a rollback starts the count anew."""
    parts = await make_parts(every_epochs=2, every_steps=10)
    async with serving(parts):
        for step in (9, 10, 15, 21):
            parts.step = step
            parts.checkpointing.on_step(step)
            await parts.until_idle()
        for epoch in (1, 2):
            parts.step = 25 + epoch
            parts.checkpointing.on_epoch(epoch_done(25 + epoch, epoch))
            await parts.until_idle()
        for step in (4, 13, 14):
            parts.step = step
            parts.checkpointing.on_step(step)
            await parts.until_idle()
    assert await parts.steps() == [10, 21, 27, 14]
    assert [row.global_step for row in parts.observer.written] == [10, 21, 27, 14]
    assert (parts.run.log, parts.checkpointing.failing, parts.observer.failed) == ([], "", [])


async def test_a_resumed_run_counts_from_its_first_step(make_parts: CheckpointingFactory) -> None:
    """Its first steps do not write again what was resumed."""
    parts = await make_parts(every_steps=10, from_step=1000)
    async with serving(parts):
        parts.checkpointing.on_step(1009)
        await parts.until_idle()
        assert parts.captures == 0
        parts.checkpointing.on_step(1010)
        await parts.until_idle()
    assert parts.captures == 1


async def test_steps_are_counted_from_an_operators_checkpoint_too(make_parts: CheckpointingFactory) -> None:
    """The next periodic checkpoint is the full distance after it."""
    parts = await make_parts(every_steps=10)
    async with serving(parts):
        parts.step = 8
        await parts.checkpointing.create("test")
        for step in (17, 18):
            parts.step = step
            parts.checkpointing.on_step(step)
            await parts.until_idle()
    assert await parts.steps() == [8, 18]


@pytest.mark.parametrize(("best", "metric"), [("accuracy", 0.5), ("loss", 2.0)])
async def test_only_a_validated_state_has_a_metric(make_parts: CheckpointingFactory, best: str, metric: float) -> None:
    """An epoch's checkpoint has its figure, also a few steps later, and so has another one of the same step.

    An evaluation without a sample has no metric.
    """
    parts = await make_parts(every_steps=10, best=best)
    async with serving(parts):
        parts.step = 12
        parts.checkpointing.on_epoch(epoch_done(10))
        await parts.until_idle()
        await parts.checkpointing.create("test")
        parts.step = 22
        parts.checkpointing.on_step(22)
        await parts.until_idle()
        parts.step = 30
        parts.checkpointing.on_epoch(epoch_done(30, samples=0))
        await parts.until_idle()
    assert [(row.global_step, row.metric) for row in await parts.rows()] == [
        (12, metric),
        (12, metric),
        (22, None),
        (30, None),
    ]


async def test_the_metric_of_an_undone_state_is_forgotten(make_parts: CheckpointingFactory) -> None:
    """After a rollback to before it, the same step again is another state."""
    parts = await make_parts(every_epochs=0)
    parts.checkpointing.on_epoch(epoch_done(10))
    parts.checkpointing.on_step(5)
    parts.step = 10
    assert (await parts.checkpointing.create("test")).metric is None


# -- a busy writer and a slow disk -----------------------------------------------------------------------------------


async def test_checkpoints_due_while_one_is_written_are_left_out(make_parts: CheckpointingFactory) -> None:
    """Nothing queues up behind a slow disk, and the next checkpoint that falls due is made."""
    parts = await make_parts(every_steps=1)
    parts.disk.gate.clear()
    async with serving(parts):
        for step in (1, 2, 3):
            parts.step = step
            parts.checkpointing.on_step(step)
            await anyio.wait_all_tasks_blocked()
        assert parts.captures == 1
        parts.disk.gate.set()
        await parts.until_idle()
        parts.step = 4
        parts.checkpointing.on_step(4)
        await parts.until_idle()
    assert (parts.captures, await parts.steps(), parts.run.log) == (2, [1, 4], [])


async def test_a_hanging_disk_is_reported(make_parts: CheckpointingFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No error is raised, so nothing has failed; `failing` says so until the checkpoint is written."""
    monkeypatch.setattr(checkpointing, "STALLED_S", 0.01)
    parts = await make_parts()
    parts.disk.gate.clear()
    async with serving(parts):
        parts.checkpointing.on_epoch(epoch_done(0))
        with anyio.fail_after(180):
            while not parts.checkpointing.failing:
                await anyio.sleep(0.001)
        assert parts.checkpointing.failing == "the checkpoint of step 0 takes longer than 0.01 s"
        parts.disk.gate.set()
        await parts.until_idle()
    assert (parts.checkpointing.failing, parts.run.changes, parts.observer.stalled) == ("", 2, [0])
    assert (await parts.steps(), parts.observer.failed) == ([0], [])


async def test_an_operators_checkpoint_waits_for_the_one_being_made(make_parts: CheckpointingFactory) -> None:
    """It is captured after that, with the state of that time."""
    parts = await make_parts(every_steps=1)
    parts.disk.gate.clear()
    created: list[CheckpointRow] = []

    async def create() -> None:
        created.append(await parts.checkpointing.create("before lunch"))

    async with serving(parts):
        parts.step = 1
        parts.checkpointing.on_step(1)
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(create)
            await anyio.wait_all_tasks_blocked()
            assert (parts.captures, created) == (1, [])
            parts.step = 2
            parts.disk.gate.set()
    assert ([row.global_step for row in created], await parts.steps()) == ([2], [1, 2])


async def test_a_busy_writer_is_waited_for_by_operators_only(make_parts: CheckpointingFactory) -> None:
    """A periodic checkpoint is left out; an operator's is retried until it is accepted; every lease is released."""
    parts = await make_parts(every_steps=1)
    parts.disk.gate.clear()
    for step in (1, 2):
        parts.step = step
        assert parts.writer.write(parts.lease(), metric=None) is not None
    async with serving(parts):
        parts.step = 3
        parts.checkpointing.on_step(3)
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(parts.checkpointing.create, "test")
            await parts.until_asleep(1)
            parts.disk.gate.set()
            with anyio.fail_after(180):
                while len(await parts.steps()) < 2:
                    await anyio.sleep(0.001)
            parts.wake()
    assert (await parts.steps(), parts.slept_s, parts.run.log) == ([1, 2, 3], [BUSY_S], [])
    assert parts.leases == 0


async def test_a_checkpoint_whose_caller_has_gone_is_still_written(make_parts: CheckpointingFactory) -> None:
    """A cancelled operator leaves no lease and no lock behind."""
    parts = await make_parts(every_epochs=0)
    parts.disk.gate.clear()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(parts.checkpointing.create, "test")
        await parts.until_writing()
        tasks.cancel_scope.cancel()
    parts.disk.gate.set()
    parts.step = 1
    await parts.checkpointing.create("again")
    assert await parts.steps() == [0, 1]
    assert parts.leases == 0


# -- capturing an image ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the image arrives", "in the same turn"])
async def test_a_cancelled_caller_leaves_no_image(make_parts: CheckpointingFactory, when: str) -> None:
    """Its image is released whether it arrives later or in the turn in which the task is cancelled directly."""
    parts = await make_parts()
    del parts.lane.answers[CaptureImage]
    waiting = asyncio.get_running_loop().create_task(parts.checkpointing.create("test"))
    await anyio.wait_all_tasks_blocked()
    if when == "before the image arrives":
        waiting.cancel()
        await anyio.wait_all_tasks_blocked()
        parts.lane.answer(parts.capture())
        await anyio.wait_all_tasks_blocked()
    else:
        parts.lane.answer(parts.capture())
        waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await anyio.wait_all_tasks_blocked()
    assert parts.leases == 0
    assert len(parts.lane.images) == 0
    parts.lane.answers[CaptureImage] = lambda _command: parts.capture()
    await parts.checkpointing.create("again")
    assert parts.leases == 0


async def test_an_unexpected_answer_is_a_failure_and_no_end_of_the_lane(make_parts: CheckpointingFactory) -> None:
    """Only LaneStoppedError means that there is no lane to ask any more."""
    parts = await make_parts()
    parts.lane.answers[CaptureImage] = BatchesSkipped(0)
    with pytest.raises(LaneError, match="BatchesSkipped") as caught:
        await parts.checkpointing.create("test")
    assert not isinstance(caught.value, LaneStoppedError)
    assert [stage for _, stage, _ in parts.observer.failed] == ["keep"]


# -- rollbacks -------------------------------------------------------------------------------------------------------


async def _write_at_10(parts: CheckpointingParts) -> None:
    """Has the image of step 10 captured and handed to a disk that hangs."""
    parts.disk.gate.clear()
    parts.step = 10
    parts.checkpointing.on_step(11)
    parts.checkpointing.on_epoch(epoch_done(10))
    await parts.until_writing()


@pytest.mark.parametrize(("back_to", "left"), [(4, []), (10, [10])])
async def test_a_checkpoint_in_flight_is_superseded_when_the_run_goes_back(
    make_parts: CheckpointingFactory, back_to: int, left: list[int]
) -> None:
    """An image captured before a rollback to an earlier step does not stay committed."""
    parts = await make_parts()
    async with serving(parts):
        await _write_at_10(parts)
        go_back(parts, back_to)
        parts.disk.gate.set()
        await parts.until_idle()
    assert await parts.steps() == left
    assert (parts.checkpointing.failing, parts.observer.failed) == ("", [])


async def test_a_rollback_applied_right_after_the_image_supersedes_it(make_parts: CheckpointingFactory) -> None:
    """The image counts as in flight from its event on, before the waiting task has run."""
    parts = await make_parts()
    del parts.lane.answers[CaptureImage]
    async with serving(parts):
        parts.step = 10
        parts.checkpointing.on_step(10)
        parts.checkpointing.on_epoch(epoch_done(10))
        await anyio.wait_all_tasks_blocked()
        parts.lane.answer(parts.capture())
        asyncio.get_running_loop().call_soon(go_back, parts, 4)
        await parts.until_idle()
    assert await parts.steps() == []


async def test_following_a_lineage_covers_committed_checkpoints_and_those_in_flight(
    make_parts: CheckpointingFactory,
) -> None:
    """After a rollback to step 4 only the checkpoint of step 3 can be resumed from."""
    parts = await make_parts()
    for step in (3, 6):
        parts.step = step
        await parts.checkpointing.create("test")
    async with serving(parts):
        await _write_at_10(parts)
        assert await parts.checkpointing.follow(go_back(parts, 4), "back") == 1
        assert await parts.steps() == [3]
        parts.disk.gate.set()
        await parts.until_idle()
    assert await parts.steps() == [3]


async def test_superseding_does_not_wait_long_for_the_journal(
    make_parts: CheckpointingFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane is held meanwhile; the log says that checkpoints are not superseded."""
    parts = await make_parts()
    monkeypatch.setattr("tolaria.journal.async_journal.AsyncJournal.follow", _never)
    with capture_logs() as logs, anyio.fail_after(180):
        await parts.checkpointing.follow(Lineage(), "back to 3")
    assert [(line["event"], line["detail"]) for line in logs] == [
        ("checkpoints_not_superseded", "back to 3: the journal did not answer")
    ]


def go_back(parts: CheckpointingParts, global_step: int) -> Lineage:
    """Applies the lane's restore of a step, and returns the lineage of the live state."""
    parts.points.rewound(global_step, None)
    parts.checkpointing.rewound(global_step, parts.points.lineage)
    return parts.points.lineage


async def _never(*_: object) -> None:
    await anyio.sleep_forever()


async def test_events_that_arrive_behind_the_lane_supersede_nothing(make_parts: CheckpointingFactory) -> None:
    """The image may be of a later step than the last event."""
    parts = await make_parts()
    parts.disk.gate.clear()
    async with serving(parts):
        parts.checkpointing.on_step(8)
        parts.step = 12
        parts.checkpointing.on_epoch(epoch_done(8))
        await parts.until_writing()
        parts.checkpointing.on_step(10)
        parts.checkpointing.on_step(12)
        parts.disk.gate.set()
        await parts.until_idle()
    assert await parts.steps() == [12]


async def test_a_branch_is_saved_after_a_checkpoint_that_it_has_undone(make_parts: CheckpointingFactory) -> None:
    """One in flight does not replace it; with a checkpoint to resume from, no other one is made."""
    parts = await make_parts()
    async with serving(parts):
        await _write_at_10(parts)
        parts.step = 4
        go_back(parts, 4)
        await parts.checkpointing.save_branch(4)
        parts.disk.gate.set()
        with anyio.fail_after(180):
            while await parts.steps() != [4]:
                await anyio.sleep(0.001)
        await parts.checkpointing.save_branch(4)
        await parts.until_idle()
    assert (await parts.steps(), parts.captures) == ([4], 2)


async def test_an_operators_checkpoint_is_made_anew_after_a_rollback(make_parts: CheckpointingFactory) -> None:
    """It is of the restored state when the run goes back before the commit."""
    parts = await make_parts()
    parts.disk.gate.clear()
    async with anyio.create_task_group() as tasks:
        parts.step = 10
        parts.checkpointing.on_step(10)
        tasks.start_soon(parts.checkpointing.create, "test")
        await parts.until_writing()
        parts.step = 4
        await parts.checkpointing.follow(go_back(parts, 4), "back")
        parts.disk.gate.set()
        await parts.until_asleep(1)
        parts.wake()
    assert await parts.steps() == [4]


async def test_a_checkpoint_whose_caller_has_gone_is_superseded_too(make_parts: CheckpointingFactory) -> None:
    """No task waits for the write any more when the run goes back."""
    parts = await make_parts()
    parts.disk.gate.clear()
    parts.step = 10
    parts.checkpointing.on_step(10)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(parts.checkpointing.create, "test")
        await parts.until_writing()
        tasks.cancel_scope.cancel()
    go_back(parts, 4)
    parts.disk.gate.set()
    assert await anyio.to_thread.run_sync(parts.writer.close, 20.0)
    assert await parts.steps() == []


@pytest.mark.parametrize(
    ("best", "metric"),
    [
        ("accuracy", 0.5),
        ("loss", 2.0),
        ("far/loss:min", 3.0),
        ("training/loss:min", 0.25),
        ("training/mean:max", 7.0),
        ("training/other:max", None),
        ("unknown:min", None),
    ],
)
def test_the_best_checkpoint_is_that_of_a_set_or_of_training(best: str, metric: float | None) -> None:
    """Without an evaluation only metrics of training are known."""
    sets = Evaluation.of_sets({"near": Evaluation(8.0, 2, 4), "far": Evaluation(12.0, 1, 4)})
    epoch = replace(epoch_done(10), evaluation=sets, training_loss=0.25)
    settings = CheckpointSettings(best=best)
    assert best_metric(settings, epoch, {"mean": 7.0}) == metric
    alone = replace(epoch, evaluation=Evaluation(0.0))
    assert best_metric(settings, alone, {"mean": 7.0}) == (metric if best.startswith("training") else None)
