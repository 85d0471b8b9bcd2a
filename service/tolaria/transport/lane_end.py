"""`LaneEnd`: how a process of the lane ends, and the cause of it."""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from tolaria.config.ranks import RAISED, RANK_ENDED, RANK_RAISED

_LINES_KEPT: Final = 200
_LINES_SHOWN: Final = 5

_CRASHES: Final = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP}
"""Signals that a process gets by what it does; others come from outside."""


@dataclass(slots=True)
class LaneEnd:
    """How a process ends, as far as it is known. `out_of_memory` counts the kills before its start.

    `stacks` says where the ranks were when one gave no heartbeat, `batch` which one the lane took last before
    `recovers_s`, when that rank has ended unless it gives heartbeats again; `lost` says which machine of the group has
    gone, `regrouped` that one is taken in, `code_elsewhere` how ranks on another machine have ended.
    """

    out_of_memory: int = 0
    started_s: float = field(default_factory=time.monotonic)
    without_memory: bool = False
    building: bool = True
    exits_by_s: float = math.inf
    code: int | None = None
    code_elsewhere: int | None = None
    lost: str = ""
    regrouped: bool = False
    fault: str = ""
    silent: str = ""
    stacks: str = ""
    batch: tuple[int, int] | None = None
    recovers_s: float = math.inf
    ranks: tuple[int, ...] = ()
    raised: str = ""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES_KEPT))

    @property
    def age_s(self) -> float:
        """Seconds since the start of the process."""
        return time.monotonic() - self.started_s

    def still_building(self) -> float:
        """Returns 1 until the lane is built, then 0."""
        return float(self.building)

    def goes_on(self, batch: tuple[int, int] | None) -> bool:
        """Whether the lane, which takes this batch now, has gone on after the end of a rank was due: with that rank."""
        if time.monotonic() < self.recovers_s:
            self.batch = batch
        return batch != self.batch

    def described(self, detail: str) -> tuple[str, str]:
        """Returns the kind and the cause of the end, with the last lines of its standard error, or where it crashed."""
        killed = self.code is not None and self.code < 0
        detail, shown = self._shown(detail, killed)
        said = next((line for line in reversed(self.lines) if RANK_RAISED.match(line)), "")
        if self.regrouped:
            found = "regrouped", "the group starts again with another machine"
        elif self.lost:
            found = "node_lost", self.lost
        elif self.raised or said or self.code == RAISED:
            found = "raised", self.raised or said or shown
        elif self.silent:
            found = "silent", f"{self.silent}; it {detail}"
        elif self.fault:
            found = "connection", f"{self.fault}; it {detail}"
        elif self.without_memory:
            found = "out_of_memory", f"the cgroup is out of memory; it {detail}"
        elif killed and -(self.code or 0) in _CRASHES:
            found = "crashed", f"it {detail}"
        else:
            found = ("killed" if killed else "exited"), f"it {detail}"
        return (found[0], f"{found[1]}; {self.stacks}") if self.stacks else found

    def _shown(self, detail: str, killed: bool) -> tuple[str, str]:
        """Returns how the process has ended, followed by the lines that say why; and these alone."""
        crash = next((n for n, line in enumerate(self.lines) if line.startswith("Current thread")), -_LINES_SHOWN)
        shown = "\n".join([*self.lines][crash:][:_LINES_SHOWN]).strip()
        if killed and self.code == -signal.SIGKILL:
            shown = ""  # what the process has written before says nothing about that
        ends = next((line for line in reversed(self.lines) if RANK_ENDED.match(line)), "")  # as the agent says it
        shown = "\n".join(text for text in (ends, shown.replace(ends, "").strip()) if text)
        detail = detail.partition(": ")[0] if self.code_elsewhere is None else f"ended with code {self.code_elsewhere}"
        detail += f": {shown}" if shown else ""
        if killed:
            detail = detail.replace(f"ended with code {self.code}", f"was killed by {_signal_name(-(self.code or 0))}")
        return detail, shown


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def kill_group(pid: int) -> None:
    """Kills a process that leads its group, and what it has started."""
    with suppress(ProcessLookupError, PermissionError):  # it has gone; its id may be that of another user's
        os.killpg(pid, signal.SIGKILL)
