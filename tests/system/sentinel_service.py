"""A stand-in for the service: both heartbeats on a board, a sentinel, and a way to fall silent.

    python sentinel_service.py FOLDER SILENCE

SILENCE is what happens on the first line of standard input: `gil` (the lane holds the GIL in C, for a minute at most),
`lane` (the lane hangs at work, the event loop runs) or `rest` (the lane is idle, which is no silence).
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

from tolaria.config import load_settings
from tolaria.emergency.supervision import Heartbeats, SentinelProcess, stacks_on_request
from tolaria.processes import supervised
from tolaria.signals import SignalBoard

ROUNDS_MAX = 10**10


def hold_the_gil() -> None:
    """One call into C that neither releases the GIL nor handles signals, as a bad extension does."""
    deque(itertools.repeat(None, ROUNDS_MAX), maxlen=0)


def lane(heartbeats: Heartbeats, silence: str, go: threading.Event) -> None:
    """The lane's thread: works in small steps until it falls silent."""
    with heartbeats.lane_works():
        while not go.wait(0.02):
            heartbeats.lane_beat()
        if silence == "gil":
            hold_the_gil()
        elif silence == "lane":
            threading.Event().wait()
        else:
            with heartbeats.lane_rests():
                threading.Event().wait()


def wait_for_line(go: threading.Event) -> None:
    """Reads without Python's buffers: a daemon thread in those would keep the interpreter from ending."""
    if os.read(0, 1):
        go.set()


async def serve(folder: Path, silence: str) -> None:
    """Runs until ended from outside."""
    go = threading.Event()
    limits = {"heartbeat_timeout_s": 1.0, "startup_allowance_s": 0.2, "grace_s": 0.5, "drain_s": 0.5}
    overrides = [f"emergency.{name}={seconds}" for name, seconds in limits.items()]
    settings = load_settings(None, [f"state.dir={folder}", "service.drain_timeout_s=0.1", *overrides])
    with SignalBoard.create(folder / "board", "run-1") as board, stacks_on_request(settings):
        heartbeats = Heartbeats(board.claim("tolaria"))
        threading.Thread(target=lane, args=(heartbeats, silence, go), daemon=True).start()
        threading.Thread(target=wait_for_line, args=(go,), daemon=True).start()
        sentinel = SentinelProcess(board, settings)
        async with anyio.create_task_group() as tasks, supervised(sentinel):
            tasks.start_soon(heartbeats.beat, 0.05)
            print(sentinel.pid, flush=True)  # noqa: T201 - the test reads it
            await anyio.sleep_forever()


if __name__ == "__main__":
    # In Python, as the service has it: it does not run while the GIL is held.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(77))
    anyio.run(serve, Path(sys.argv[1]), sys.argv[2])
