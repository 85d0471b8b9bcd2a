"""A stand-in for the service, with both heartbeats on a board and a sentinel, whose heartbeats can be stopped.

    python sentinel_service.py FOLDER SILENCE

SILENCE is what the first line of standard input triggers: `gil` (the lane holds the GIL in C, for a minute at most),
`lane` (the lane hangs while the event loop runs), `busy` (it hangs beside threads that run), `evaluate` (it hangs in an
evaluation) or `rest` (the lane is idle, which is not a fault).
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
from tolaria.signals.layout import LanePhase

ROUNDS_MAX = 10**10


def hold_the_gil() -> None:
    """Calls a C function that neither releases the GIL nor handles signals, like a faulty extension."""
    deque(itertools.repeat(None, ROUNDS_MAX), maxlen=0)


def changes_its_stack() -> None:
    """Calls functions that have just been made, deep into one another, and lets others run between."""
    while True:
        exec("def new(n): return new(n - 1) if n else sum(range(20))\nnew(200)", {})  # noqa: S102


def lane(heartbeats: Heartbeats, silence: str, go: threading.Event) -> None:
    """The lane's thread: works in small steps until its heartbeat stops."""
    with heartbeats.lane_works():
        while not go.wait(0.02):
            heartbeats.lane_beat()
        if silence == "gil":
            hold_the_gil()
        elif silence == "busy":
            for _ in range(2):
                threading.Thread(target=changes_its_stack, daemon=True).start()
            threading.Event().wait()
        elif silence == "lane":
            threading.Event().wait()
        elif silence == "evaluate":
            with heartbeats.lane_phase(LanePhase.EVALUATING):
                threading.Event().wait()
        else:
            with heartbeats.lane_rests():
                threading.Event().wait()


def wait_for_line(go: threading.Event) -> None:
    """Reads without a buffer: a daemon thread that holds its lock would prevent the interpreter from exiting."""
    if os.read(0, 1):
        go.set()


async def serve(folder: Path, silence: str) -> None:
    """Runs until it is terminated."""
    go = threading.Event()
    limits = {
        "heartbeat_timeout_s": 1.0,
        "phase_timeout_s": 3.0,
        "startup_allowance_s": 0.2,
        "grace_s": 0.5,
        "drain_s": 0.5,
    }
    overrides = [f"emergency.{name}={seconds}" for name, seconds in limits.items()]
    settings = load_settings(None, [f"state.dir={folder}", "service.drain_timeout_s=0.1", *overrides])
    with SignalBoard.create(folder / "board", "run-1") as board, stacks_on_request():
        heartbeats = Heartbeats(board.claim("tolaria"), settings.emergency)
        threading.Thread(target=lane, args=(heartbeats, silence, go), daemon=True).start()
        threading.Thread(target=wait_for_line, args=(go,), daemon=True).start()
        sentinel = SentinelProcess(board, settings)
        async with anyio.create_task_group() as tasks, supervised(sentinel):
            tasks.start_soon(heartbeats.beat, 0.05)
            print(sentinel.pid, flush=True)  # noqa: T201 - the test reads it
            await anyio.sleep_forever()


if __name__ == "__main__":
    # A handler in Python, as in the service: it cannot run while the GIL is held.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(77))
    anyio.run(serve, Path(sys.argv[1]), sys.argv[2])
