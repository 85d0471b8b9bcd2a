from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from support.processes import is_alive
from tolaria.emergency.guard import Post, keep_sentinel, sentinel_process
from tolaria.errors import SentinelFailedError
from tolaria.signals import SignalBoard

pytestmark = pytest.mark.anyio
DEAF = (sys.executable, "-c", "import os, time; print('{\"watching\": %d}' % os.getppid(), flush=True); time.sleep(60)")


@pytest.fixture
def board(tmp_path: Path) -> Iterator[SignalBoard]:
    """The board of this process."""
    with SignalBoard.create(tmp_path / "board", "-run") as board:
        yield board


def post(board: SignalBoard, run_id: str = "-run") -> Post:
    """A patient watch over this process."""
    stacks = board.path.with_name("stacks")
    return Post(board.path, run_id, stacks, heartbeat_timeout_s=60, startup_s=60, grace_s=60, drain_s=60)


async def test_it_watches_while_the_block_runs(board: SignalBoard) -> None:
    """Its block of the board is claimed and beats; afterwards the process is gone and the block is free."""
    async with sentinel_process(post(board)) as sentinel:
        state = board.read("sentinel")
        assert state.record is not None
        assert (state.record.owner_pid, is_alive(sentinel.pid)) == (sentinel.pid, True)
    assert not is_alive(sentinel.pid)
    board.claim("sentinel")


async def test_an_error_or_cancellation_leaves_no_process(board: SignalBoard) -> None:
    """However the block ends."""
    pids = []
    with pytest.raises(KeyError):  # noqa: PT012 - the block's own error is what is tried
        async with sentinel_process(post(board)) as sentinel:
            pids.append(sentinel.pid)
            raise KeyError
    with anyio.CancelScope() as scope:
        async with sentinel_process(post(board)) as sentinel:
            pids.append(sentinel.pid)
            scope.cancel()
            await anyio.sleep_forever()
    assert not any(is_alive(pid) for pid in pids)


async def test_one_that_does_not_go_is_killed(board: SignalBoard) -> None:
    """The end of its input is a request; it has so long to obey."""
    async with sentinel_process(post(board), command=DEAF, stop_timeout_s=0.1) as sentinel:
        assert is_alive(sentinel.pid)
    assert not is_alive(sentinel.pid)


@pytest.mark.parametrize(
    ("command", "start_timeout_s", "complaint"),
    [
        (("/nonexistent/program",), 30, "cannot be started"),
        ((sys.executable, "-c", "raise SystemExit(9)"), 30, "ended with code 9"),
        ((sys.executable, "-c", "print('hello')"), 30, "does not say"),
        ((sys.executable, "-c", "print('{\"watching\": 1}')"), 30, "does not say"),
        ((sys.executable, "-c", "import time; time.sleep(60)"), 0.2, "within 0.2 s"),
    ],
)
async def test_one_that_does_not_watch_is_an_error(
    board: SignalBoard, command: tuple[str, ...], start_timeout_s: float, complaint: str
) -> None:
    """It cannot be started, ends, says something else or nothing; and leaves no process."""
    with pytest.raises(SentinelFailedError, match=complaint):
        async with sentinel_process(post(board), command=command, start_timeout_s=start_timeout_s, stop_timeout_s=0.1):
            pass


async def test_it_refuses_another_runs_board(board: SignalBoard) -> None:
    """Exit code 3: it cannot watch."""
    with pytest.raises(SentinelFailedError, match="code 3"):
        async with sentinel_process(post(board, "another")):
            pass


async def test_a_lost_sentinel_is_replaced(board: SignalBoard) -> None:
    """Its loss is told, and another one watches; the last one goes with the task."""
    lost: list[str] = []

    async def watching_pid(not_: int) -> int:
        with anyio.fail_after(30):
            while True:
                state = board.read("sentinel")
                if state.record is not None and state.record.owner_pid not in {0, not_}:
                    return state.record.owner_pid
                await anyio.sleep(0.01)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: keep_sentinel(post(board), on_lost=lost.append, retry_s=0.01))
        first = await watching_pid(0)
        os.kill(first, signal.SIGKILL)
        second = await watching_pid(first)
        tasks.cancel_scope.cancel()
    assert lost == ["it ended with code -9"]
    assert not is_alive(first)
    assert not is_alive(second)
