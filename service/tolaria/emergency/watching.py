"""Keeps a controller and its board together: the event loop's task that waits on the bell.

Owns the waiting. Must not know what an emergency means.
"""

from __future__ import annotations

import anyio
import anyio.to_thread

from tolaria.emergency.controller import EmergencyController
from tolaria.errors import BoardLostError
from tolaria.signals import SignalBoard


async def watch_board(board: SignalBoard, controller: EmergencyController, *, interval_s: float = 0.25) -> None:
    """Take in what peers put on the board as soon as its bell rings, and do what is due, until cancelled.

    Waits in one worker thread, without the GIL, at most `interval_s` at a time; the bell itself is heard in tens of
    microseconds. Once the board is lost the controller has said so; what is due is still done, every `interval_s`.
    """
    limiter = anyio.CapacityLimiter(1)
    while True:
        try:
            seen = board.bell  # before reading: what comes in between must not be slept through
        except BoardLostError:
            seen = None
        controller.observe_board()
        controller.pump()
        due_in_s = controller.due_in_s
        timeout_s = interval_s if due_in_s is None else min(interval_s, due_in_s)
        if seen is None:
            await anyio.sleep(timeout_s)
        else:
            await _ring(board, seen, timeout_s, limiter)


async def _ring(board: SignalBoard, seen: int, timeout_s: float, limiter: anyio.CapacityLimiter) -> None:
    try:
        await anyio.to_thread.run_sync(board.wait, seen, timeout_s, abandon_on_cancel=True, limiter=limiter)
    except BoardLostError:
        await anyio.sleep(timeout_s)
