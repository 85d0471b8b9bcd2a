"""Waiting for conditions in other processes."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(holds: Callable[[], bool], timeout_s: float = 300.0, *, every_s: float = 0.01) -> None:
    """Polls until the condition holds; raises AssertionError after the timeout."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, "the condition was not met in time"
        time.sleep(every_s)
