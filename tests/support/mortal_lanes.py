"""Services with a lane that dies: settings, the process of the lane, and what the log says of its deaths."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final

from support.processes import Serve

JOB: Final = ["training.job=support.mortal_jobs:Mortal", "training.device=cpu", "training.threads=1"]
FINITE: Final = [*JOB, "training.epochs=6", "training.deterministic=true", "training.options.samples=320"]
ENDLESS: Final = [*JOB, "training.epochs=100000000", "training.options.step_s=0.001", "training.options.lr=0.001"]


def lane_of(service: Serve) -> int:
    """Returns the id of the process of the lane; 0 if there is none."""
    for pid in service.children():
        with suppress(OSError):
            if b"tolaria.lane" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return 0


def losses(service: Serve) -> list[dict[str, object]]:
    """Returns the log lines of lost processes."""
    return [line for line in service.events() if line["event"] == "tolaria.lane_lost"]


def recoveries(service: Serve) -> int:
    """Returns how often the lane has recovered."""
    return sum(line["event"] == "tolaria.lane_recovered" for line in service.events())


def stop_for_good(pid: int) -> None:
    """Stops a process, as a debugger does that is forgotten."""
    os.kill(pid, signal.SIGSTOP)
