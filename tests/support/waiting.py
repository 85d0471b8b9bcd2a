"""Waiting for another process, from outside."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Ask until it does; AssertionError when it never did."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.01)
