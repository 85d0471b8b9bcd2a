from __future__ import annotations

from typing import Any, cast

import anyio
import pytest

from leyline.v1 import admin_service_pb2 as admin
from tolaria.errors import CheckpointWriteError, WrongStateError
from tolaria.rollback import CheckpointRow
from tolaria.training.recovery.archive import Archive
from tolaria.training.recovery.operators import RecoveryDesk

pytestmark = pytest.mark.anyio


class FakeRun:
    """Makes a checkpoint when it is let."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.go_on = anyio.Event()
        self.error: CheckpointWriteError | None = None

    async def checkpoint(self, reason: str) -> CheckpointRow:
        """One more, or what went wrong."""
        self.reasons.append(reason)
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        number = len(self.reasons)
        return CheckpointRow(f"c{number}", number, "run", number, 1, 100, "d", None)


def desk_of(run: FakeRun) -> RecoveryDesk:
    """A desk that is asked for checkpoints only."""
    return RecoveryDesk(cast("Any", run), cast("Archive", None), lambda: ())


def asked(request_id: str) -> admin.CreateCheckpointRequest:
    """For a checkpoint."""
    return admin.CreateCheckpointRequest(request_id=request_id, reason=f"for {request_id}")


async def test_a_request_that_comes_again_is_one_checkpoint() -> None:
    """Its caller went away: the repeat waits for the same one, and later gets it; another request is another one."""
    run = FakeRun()
    desk = desk_of(run)
    with anyio.move_on_after(0.01):
        await desk.create_checkpoint(asked("a"))
    with anyio.move_on_after(0.01):
        await desk.create_checkpoint(asked("a"))
    run.go_on.set()
    assert [(await desk.create_checkpoint(asked("a"))).checkpoint_id for _ in range(2)] == ["c1", "c1"]
    assert (await desk.create_checkpoint(asked("b"))).checkpoint_id == "c2"
    assert run.reasons == ["for a", "for b"]


async def test_what_fails_while_nobody_waits_is_told_to_the_repeat() -> None:
    """And is not tried again."""
    run = FakeRun()
    desk = desk_of(run)
    run.error = CheckpointWriteError("write", "ENOSPC", "full")
    with anyio.move_on_after(0.01):
        await desk.create_checkpoint(asked("a"))
    run.go_on.set()
    with pytest.raises(CheckpointWriteError):
        await desk.create_checkpoint(asked("a"))
    assert len(run.reasons) == 1


async def test_only_so_many_wait_at_once_and_are_remembered() -> None:
    """Beyond that a request is refused while all wait, and the oldest that is over is forgotten."""
    run = FakeRun()
    desk = desk_of(run)
    for number in range(16):
        with anyio.move_on_after(0.001):
            await desk.create_checkpoint(asked(str(number)))
    with pytest.raises(WrongStateError, match="16 checkpoints"):
        await desk.create_checkpoint(asked("x"))
    run.go_on.set()
    await desk.create_checkpoint(asked("0"))
    await desk.create_checkpoint(asked("x"))
    assert len(desk._creations) == 16
