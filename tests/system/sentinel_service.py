"""A stand-in for the service: both hearts on a board, a sentinel, and a way to fall silent.

    python sentinel_service.py FOLDER SILENCE

SILENCE is what happens on the first line of standard input: `gil` (the lane holds the GIL in C, for a minute at most),
`lane` (the lane is stuck at work, the event loop is well) or `rest` (the lane is held: all is well).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections import deque
from pathlib import Path

import anyio

from tolaria.emergency.guard import Post, sentinel_process
from tolaria.emergency.heartbeats import Heartbeats
from tolaria.emergency.stacks import register_stack_dump
from tolaria.signals import SignalBoard

ROUNDS_MAX = 10**10


def hold_the_gil() -> None:
    """One call into C that neither lets the GIL go nor looks at signals, as a bad extension does."""
    deque(itertools.repeat(None, ROUNDS_MAX), maxlen=0)


def lane(hearts: Heartbeats, silence: str, go: threading.Event) -> None:
    """The lane's thread: works in small steps until it is told to fall silent."""
    with hearts.lane_works():
        while not go.wait(0.02):
            hearts.lane_beat()
        if silence == "gil":
            hold_the_gil()
        elif silence == "lane":
            threading.Event().wait()
        else:
            with hearts.lane_rests():
                threading.Event().wait()


def wait_for_line(go: threading.Event) -> None:
    """Read past Python's buffers: a daemon thread in those would keep the interpreter from ending."""
    if os.read(0, 1):
        go.set()


async def serve(folder: Path, silence: str) -> None:
    """Until ended from outside."""
    go = threading.Event()
    with (
        SignalBoard.create(folder / "board", "run-1") as board,
        register_stack_dump(folder / "stacks"),
    ):
        hearts = Heartbeats(board.claim("tolaria"))
        post = Post(
            folder / "board",
            "run-1",
            folder / "stacks",
            heartbeat_timeout_s=1.0,
            startup_s=0.2,
            grace_s=0.5,
            drain_s=0.5,
        )
        threading.Thread(target=lane, args=(hearts, silence, go), daemon=True).start()
        threading.Thread(target=wait_for_line, args=(go,), daemon=True).start()
        async with anyio.create_task_group() as tasks, sentinel_process(post) as sentinel:
            tasks.start_soon(hearts.beat, 0.05)
            print(sentinel.pid, flush=True)  # noqa: T201 - the test reads it
            await anyio.sleep_forever()


if __name__ == "__main__":
    # In Python, as the real service has it: of no use while the GIL is held.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(77))
    anyio.run(serve, Path(sys.argv[1]), sys.argv[2])
