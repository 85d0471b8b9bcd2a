"""Checkpoints of a state that is undone by a rollback before they are committed; `test_checkpointing` has the parts."""

from __future__ import annotations

import anyio
import anyio.to_thread
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_ROLLBACK, ROLLBACK_TIER_FAST
from leyline.v1.state_pb2 import SystemStatePacket
from support.checkpointing import Disk
from support.peers import command
from support.runs import AcceptingParticipant, Answer, FakePeers, new_run, no_change, running
from tolaria.journal.rows import CheckpointRow
from tolaria.lane.messages import EpochDone
from tolaria.rollback.protocol import Rollback

pytestmark = pytest.mark.anyio

RING: dict[str, object] = {"automatic": False, "every_steps": 3, "fast_budget_s": 10.0, "snapshots_max": 100}


class SlowParticipant(AcceptingParticipant):
    """Accepts to prepare a rollback after 20 ms."""

    async def prepare(self, order: object, /) -> object:
        await anyio.sleep(0.02)
        return await super().prepare(order)


def peers_slow_to_roll_back(answer: Answer = no_change) -> FakePeers:
    """Returns peers of which Tamiyo delays every rollback."""
    peers = FakePeers(answer)
    peers.participants = {"tamiyo": SlowParticipant()}  # type: ignore[dict-item] # the answers are what it needs
    return peers


async def test_no_checkpoint_is_made_at_a_boundary_during_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller's answer at an epoch's end begins a rollback: that epoch is not passed to checkpointing."""
    asked = anyio.Event()

    async def answer(state: SystemStatePacket) -> AdaptationCommand | None:
        if asked.is_set() or state.current_epoch < 2:
            return None
        asked.set()
        back = command(COMMAND_ROLLBACK)
        back.rollback_payload.update({"target_step": 3})
        return back

    sections: dict[str, object] = {"rollback": RING, "checkpoint": {"every_epochs": 2}}
    run = new_run(peers_slow_to_roll_back(answer), epochs=10**6, sections=sections)
    rolling_back: list[bool] = []
    on_epoch = run.checkpointing.on_epoch

    def recorded(epoch: EpochDone) -> None:
        rolling_back.append(run.recovery.running)
        on_epoch(epoch)

    monkeypatch.setattr(run.checkpointing, "on_epoch", recorded)
    async with running(run):
        await run.until(lambda: run.status.rollbacks == 1 and len(rolling_back) > 1)
        assert not any(rolling_back)
        await run.run.stop("enough")


async def test_the_last_checkpoint_waits_for_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped during a rollback ends with a checkpoint of the restored state."""
    sections: dict[str, object] = {"rollback": RING, "checkpoint": {"every_epochs": 10**6}}
    run = new_run(peers_slow_to_roll_back(), epochs=10**6, sections=sections)
    create, rolling_back = run.checkpointing.create, list[bool]()

    async def recorded(reason: str) -> CheckpointRow:
        rolling_back.append(run.recovery.running)
        return await create(reason)

    monkeypatch.setattr(run.checkpointing, "create", recorded)
    async with running(run):
        await run.until(lambda: run.status.global_step > 20)
        run.recovery.begin(Rollback(ROLLBACK_TIER_FAST, 6, "back", "operator"))
        await run.run.stop("enough")
        points = await anyio.to_thread.run_sync(run.storage.checkpoints.restore_points)
    assert rolling_back == [False]
    assert {row.global_step for row in points} == {6}


async def test_a_checkpoint_in_flight_during_an_operators_rollback_is_superseded() -> None:
    """The disk hangs, the run rolls back, the disk answers: the operator's checkpoint is of the state after that."""
    disk = Disk()
    run = new_run(FakePeers(), epochs=10**6, sections={"rollback": RING}, files=disk)
    async with running(run):
        await run.until(lambda: run.status.global_step > 20)
        async with anyio.create_task_group() as tasks:
            disk.gate.clear()
            tasks.start_soon(run.run.checkpoint, "before")
            await run.until(lambda: run.core.foundation.writer.pending > 0)
            back = await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, 6, "back", "operator"))
            await run.run.pause("look")
            disk.gate.set()
        points = await anyio.to_thread.run_sync(run.storage.checkpoints.restore_points)
        assert back.restored_step == 6
        # The operator's checkpoint was made anew, of the paused state.
        assert [row.global_step for row in points] == [run.module.global_step]
        await run.run.stop("enough")
