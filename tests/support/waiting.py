"""Waiting for conditions in other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

PAUSE_S_MAX: Final = 0.1


def wait_for(holds: Callable[[], bool], timeout_s: float = 300.0, *, every_s: float = 0.01) -> None:
    """Polls until the condition holds; raises AssertionError after the timeout.

    What takes longer is asked after more seldom, which leaves the cores to what is waited for.
    """
    began_s = time.monotonic()
    while not holds():
        waited_s = time.monotonic() - began_s
        assert waited_s < timeout_s, "the condition was not met in time"
        time.sleep(max(every_s, min(waited_s / 20, PAUSE_S_MAX)))
