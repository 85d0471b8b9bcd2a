"""`LaneStacks`: the stacks of all processes of the lane, of every machine, in a file of the state directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import structlog

from tolaria.ranks.local_ranks import ranks_of
from tolaria.ranks.stacks import STACKS_FILE, append_stacks, stacks_of, summary
from tolaria.transport.rendezvous import Rendezvous

_DISK_S: Final = 5.0

_log = structlog.get_logger(__name__)


class LaneStacks:
    """Collects stacks and appends them to the file of the state directory.

    `rendezvous` is that of a group on several machines.
    """

    def __init__(self, state_dir: str, rendezvous: Rendezvous | None) -> None:
        self._path = Path(state_dir) / STACKS_FILE
        self._rendezvous = rendezvous
        self._one_at_a_time = anyio.Lock()

    async def dump(self, pid: int, why: str) -> str:
        """Dumps the stacks of all ranks, `pid` being the lane's process or the agent's of its ranks here.

        Returns in one line where the ranks are, and in which file to look. Takes up to nine seconds, five of them
        for the disk.
        """
        async with self._one_at_a_time:
            found = dict[int, str]()
            async with anyio.create_task_group() as tasks:
                if self._rendezvous is not None:
                    tasks.start_soon(self._add_of_others, self._rendezvous, found)
                found |= await anyio.to_thread.run_sync(_stacks_here, pid)
            found = dict(sorted(found.items()))
            where = summary(found)
            if (problem := await self._write(why, found)) == "":
                where += f" (stacks in {self._path})"
            else:
                _log.warning("stacks_not_written", file=str(self._path), detail=problem)
            _log.error("lane_stacks", why=why, where=where)
            return where

    async def _write(self, why: str, found: Mapping[int, str]) -> str:
        """Appends stacks to the file; returns why that did not succeed, else nothing."""
        try:
            with anyio.move_on_after(_DISK_S):  # a lane that hangs for the same disk must be ended all the same
                await anyio.to_thread.run_sync(self._append, why, found, abandon_on_cancel=True)
                return ""
        except OSError as error:
            return str(error)
        return f"not written within {_DISK_S:g} s"

    async def _add_of_others(self, rendezvous: Rendezvous, found: dict[int, str]) -> None:
        found.update(await rendezvous.stacks())

    def _append(self, why: str, found: Mapping[int, str]) -> None:
        append_stacks(self._path, f"the lane: {why}", {f"rank {rank}": text for rank, text in found.items()})


def _stacks_here(pid: int) -> dict[int, str]:
    return stacks_of(ranks_of(pid) or {0: pid})
