"""Services whose lane is a group of ranks: settings, the process of the agent, and what the log says."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from support.processes import Serve, status, stub_of
from support.waiting import wait_for

JOB: Final = ["training.job=support.mortal_jobs:Mortal", "training.device=cpu", "training.threads=1"]
GROUP: Final = [*JOB, "lane.mode=torchrun", "lane.processes=2"]
FINITE: Final = ["training.epochs=6", "training.deterministic=true", "training.options.samples=320"]
UNSEEN: Final = 3
"""Steps that a lane may have begun, and the service not have heard of, when it dies."""

LIMITS: Final = ["emergency.heartbeat_timeout_s=10", "emergency.phase_timeout_s=30"]


def agent_of(service: Serve) -> int:
    """Returns the id of the process of the agent; 0 if there is none."""
    return next((pid for pid in service.children() if "tolaria.ranks.agent" in words_of(pid)), 0)


def words_of(pid: int) -> str:
    """Returns the command line of a process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def named(service: Serve, event: str) -> list[dict[str, object]]:
    """Returns the log lines of an event."""
    return [line for line in service.events() if line["event"] == event]


def pass_lost_batches(service: Serve) -> None:
    """Waits until the run is past the batches with which its processes have died.

    A batch with which two processes in a row die is left out, so the next one must not die with the same.
    """
    last = max((int(str(line["step"])) for line in named(service, "tolaria.lane_lost")), default=0)
    with stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > last + UNSEEN)
