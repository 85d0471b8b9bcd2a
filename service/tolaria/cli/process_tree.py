"""`ProcessTree`: what a process has started, as /proc shows it."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

_PROC: Final = Path("/proc")
_LOOK_S: Final = 0.5
_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class ProcessEntry:
    """One process. Its start, in clock ticks after boot, distinguishes it from a later one with the same id."""

    pid: int
    parent: int
    session: int
    started: int
    ended: bool

    @classmethod
    def of(cls, folder: Path) -> ProcessEntry:
        """Reads a folder of /proc. Raises OSError if the process has gone."""
        state, *fields = (folder / "stat").read_text().rpartition(")")[2].split()
        parent, _, session, *others = map(int, fields)
        return cls(int(folder.name), parent, session, others[15], state in {"Z", "X"})


def entries() -> list[ProcessEntry]:
    """Returns all processes of the machine that /proc shows."""
    found = []
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                found.append(ProcessEntry.of(folder))
    return found


class ProcessTree:
    """Processes and all that they have started, directly or not, also those whose parents have ended since a look.

    A process escapes only if it begins a session and its parent ends, both between two looks.
    """

    def __init__(self) -> None:
        self._roots: set[int] = set()
        self._seen: dict[int, ProcessEntry] = {}

    def __len__(self) -> int:
        """The number of processes that were seen."""
        return len(self._seen)

    def add(self, root: int) -> None:
        """Adds a running process."""
        self._roots.add(root)

    def look(self) -> None:
        """Adds what has been started since."""
        found = {entry.pid: entry for entry in entries()}
        self._seen |= {pid: found[pid] for pid in self._roots & found.keys()}
        self._roots -= found.keys()
        grown = True
        while grown:
            sessions = {entry.session for entry in self._seen.values()} & self._seen.keys()
            parents = {pid for pid, entry in found.items() if self._is_seen(entry)}
            new = {
                pid: entry
                for pid, entry in found.items()
                if not self._is_seen(entry) and (entry.parent in parents or entry.session in sessions)
            }
            self._seen |= new
            grown = bool(new)

    async def watch(self) -> None:
        """A task: looks again and again, until cancelled."""
        while True:
            await anyio.to_thread.run_sync(self.look)
            await anyio.sleep(_LOOK_S)

    async def left(self, within_s: float) -> tuple[int, ...]:
        """Returns the ids of those that still run after some time; returns early if there are none."""
        return await anyio.to_thread.run_sync(self._left, within_s)

    def running(self) -> tuple[int, ...]:
        """Returns the ids of those that run now."""
        self.look()
        return tuple(entry.pid for entry in entries() if self._is_seen(entry) and not entry.ended)

    def _left(self, within_s: float) -> tuple[int, ...]:
        until_s = time.monotonic() + within_s
        while (alive := self.running()) and time.monotonic() < until_s:
            time.sleep(_POLL_S)
        return alive

    def _is_seen(self, entry: ProcessEntry) -> bool:
        seen = self._seen.get(entry.pid)
        return seen is not None and seen.started == entry.started
