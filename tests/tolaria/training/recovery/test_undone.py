"""Checkpoints of a past that is undone while they are on their way to disk."""

from __future__ import annotations

from types import SimpleNamespace

import anyio
import anyio.to_thread
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_ROLLBACK, ROLLBACK_TIER_FAST
from leyline.v1.state_pb2 import SystemStatePacket
from support.checkpoint_room import Disk, Rooms, evaluation, serving
from support.peers import command
from support.runs import Answer, FakePeers, new_run, no_change, running
from tolaria.journal.rows import CheckpointRow
from tolaria.rollback.participants import Seat
from tolaria.training.recovery.checkpoints import Evaluation
from tolaria.training.recovery.rollbacks import Asked

pytestmark = pytest.mark.anyio

RING: dict[str, object] = {"automatic": False, "every_steps": 3, "fast_budget_s": 10.0, "snapshots_max": 100}


@pytest.mark.parametrize(("back_to", "left"), [(4, []), (10, [10])])
async def test_the_desk_lets_no_undone_state_stand(rooms: Rooms, back_to: int, left: list[int]) -> None:
    """What was kept before the run went back behind it is superseded when it is committed at last."""
    room = await rooms()
    room.disk.gate.clear()
    async with serving(room):
        room.at(10)
        room.desk.stepped(11)
        room.desk.epoch_over(evaluation(10))
        await anyio.wait_all_tasks_blocked()
        await room.handed_over()
        room.desk.stepped(back_to)
        room.disk.gate.set()
        await room.quiet()
    assert await room.steps() == left
    assert (room.desk.failing, room.value("failures_total")) == ("", 0)


async def test_reports_that_come_behind_the_lane_undo_nothing(rooms: Rooms) -> None:
    """The image may be of a later step than the desk has been told of."""
    room = await rooms()
    room.disk.gate.clear()
    async with serving(room):
        room.desk.stepped(8)
        room.at(12)
        room.desk.epoch_over(evaluation(8))
        await room.handed_over()
        room.desk.stepped(10)
        room.desk.stepped(12)
        room.disk.gate.set()
        await room.quiet()
    assert await room.steps() == [12]


async def test_an_operators_checkpoint_is_of_the_state_that_was_gone_back_to(rooms: Rooms) -> None:
    """It is made anew when the run goes back meanwhile."""
    room = await rooms()
    room.disk.gate.clear()
    async with anyio.create_task_group() as tasks:
        room.at(10)
        room.desk.stepped(10)
        tasks.start_soon(room.desk.create, "test")
        await room.handed_over()
        room.at(4)
        room.desk.went_back(4)
        room.disk.gate.set()
        await room.asleep(1)
        room.wake()
    assert await room.steps() == [4]


async def test_an_operator_who_goes_away_leaves_no_undone_state(rooms: Rooms) -> None:
    """Nobody waits for the write any more, and it is superseded all the same."""
    room = await rooms()
    room.disk.gate.clear()
    room.at(10)
    room.desk.stepped(10)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(room.desk.create, "test")
        await room.handed_over()
        tasks.cancel_scope.cancel()
    room.desk.stepped(4)
    room.disk.gate.set()
    assert await anyio.to_thread.run_sync(room.writer.close, 20.0)
    assert await room.steps() == []


def _slow_to_go_back(answer: Answer = no_change) -> FakePeers:
    peers = FakePeers(answer)
    participant = SimpleNamespace(prepare=_assent, commit=_assent, confirm=_assent, abort=_assent)
    peers.seats = [Seat("tamiyo", participant)]
    return peers


async def _assent(_order: object, /) -> SimpleNamespace:
    await anyio.sleep(0.02)
    return SimpleNamespace(accepted=True, detail="")


async def test_nothing_is_kept_at_a_boundary_while_the_run_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller's answer at an epoch's end begins it: what is about to be undone is not asked for."""
    asked = anyio.Event()

    async def answer(state: SystemStatePacket) -> AdaptationCommand | None:
        if asked.is_set() or state.current_epoch < 2:
            return None
        asked.set()
        back = command(COMMAND_ROLLBACK)
        back.rollback_payload.update({"target_step": 3})
        return back

    run = new_run(
        _slow_to_go_back(answer), epochs=10**6, sections={"rollback": RING, "checkpoint": {"every_epochs": 2}}
    )
    told: list[bool] = []
    epoch_over = run.loop.checkpoints.epoch_over

    def watched(found: Evaluation) -> None:
        told.append(run.loop.rollbacks.running)
        epoch_over(found)

    monkeypatch.setattr(run.loop.checkpoints, "epoch_over", watched)
    async with running(run):
        await run.until(lambda: run.loop.rollbacks.completed == 1 and len(told) > 1)
        assert not any(told)
        await run.loop.stop("enough")


async def test_a_last_checkpoint_waits_for_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while it goes back, the run leaves with the state that it went back to."""
    run = new_run(_slow_to_go_back(), epochs=10**6, sections={"rollback": RING, "checkpoint": {"every_epochs": 10**6}})
    create, asked = run.loop.checkpoints.create, list[bool]()

    async def watched(reason: str) -> CheckpointRow:
        asked.append(run.loop.rollbacks.running)
        return await create(reason)

    monkeypatch.setattr(run.loop.checkpoints, "create", watched)
    async with running(run):
        await run.until(lambda: run.progress.global_step > 20)
        run.loop.rollbacks.begin(Asked(ROLLBACK_TIER_FAST, 6, "back", "operator"))
        await run.loop.stop("enough")
        points = await anyio.to_thread.run_sync(run.parts.ground.storage.checkpoints.restore_points)
    assert asked == [False]
    assert [row.global_step for row in points] == [6]


async def test_a_checkpoint_on_its_way_when_an_operator_goes_back_is_superseded() -> None:
    """Through the real wiring: the disk hangs, the run goes back, the disk answers."""
    disk = Disk()
    run = new_run(FakePeers(), epochs=10**6, sections={"rollback": RING}, files=disk)
    async with running(run):
        await run.until(lambda: run.progress.global_step > 20)
        async with anyio.create_task_group() as tasks:
            disk.gate.clear()
            tasks.start_soon(run.loop.checkpoint, "before")
            await run.until(lambda: run.parts.ground.writer.pending > 0)
            outcome = await run.loop.roll_back(Asked(ROLLBACK_TIER_FAST, 6, "back", "operator"))
            await run.loop.pause("look")
            disk.gate.set()
        points = await anyio.to_thread.run_sync(run.parts.ground.storage.checkpoints.restore_points)
        assert outcome.restored_step == 6
        # The operator's has been made anew, of the state that the run stands in.
        assert [row.global_step for row in points] == [run.rig.global_step]
        await run.loop.stop("enough")
