from __future__ import annotations

from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT
from tolaria.reference.attendance import attend_board
from tolaria.signals import SignalBoard

pytestmark = pytest.mark.anyio


async def test_a_peer_beats_and_acknowledges_and_finds_a_new_board(tmp_path: Path) -> None:
    """It waits for a board, acknowledges what is raised on it, and joins the next one under the same name."""
    path = tmp_path / "board"
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(attend_board, path, "kasmina")
        for run_id in ("one", "two"):
            board = await anyio.to_thread.run_sync(SignalBoard.create, path, run_id)
            me = board.claim("tolaria")
            with anyio.fail_after(10):
                while not board.read("kasmina").heartbeat_ns:
                    await anyio.sleep(0.01)
                signal_id = me.raise_level(EMERGENCY_LEVEL_HALT, "smoke")
                while "kasmina" not in board.acknowledgements(signal_id):
                    await anyio.sleep(0.01)
            await anyio.to_thread.run_sync(partial(board.close, unlink=True))
        tasks.cancel_scope.cancel()
