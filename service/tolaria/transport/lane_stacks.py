"""`LaneStacks`: the stacks of all processes of the lane, of every machine, in a file of the state directory."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import structlog

from tolaria.filesystem import open_to_append
from tolaria.ranks.local_ranks import ranks_of
from tolaria.ranks.stacks import CHARACTERS_MAX, stacks_of, summary
from tolaria.transport.rendezvous import Rendezvous

_DUMP_CHARACTERS: Final = 2**20
_RANK_CHARACTERS_MIN: Final = 400
_FILE_BYTES_MAX: Final = 4 * 2**20

_log = structlog.get_logger(__name__)


class LaneStacks:
    """Collects stacks and appends them to `stacks.txt`, of which the newest part is kept.

    `rendezvous` is that of a group on several machines.
    """

    def __init__(self, state_dir: str, rendezvous: Rendezvous | None) -> None:
        self._path = Path(state_dir) / "stacks.txt"
        self._rendezvous = rendezvous
        self._one_at_a_time = anyio.Lock()

    async def dump(self, pid: int, why: str) -> str:
        """Dumps the stacks of all ranks, `pid` being the lane's process or the agent's of its ranks here.

        Returns in one line where the ranks are, and in which file to look. Takes up to two seconds.
        """
        async with self._one_at_a_time:
            found = dict[int, str]()
            async with anyio.create_task_group() as tasks:
                if self._rendezvous is not None:
                    tasks.start_soon(self._add_of_others, self._rendezvous, found)
                found |= await anyio.to_thread.run_sync(_stacks_here, pid)
            found = dict(sorted(found.items()))
            where = summary(found)
            try:
                await anyio.to_thread.run_sync(self._append, why, found)
            except OSError as error:
                _log.warning("stacks_not_written", file=str(self._path), detail=str(error))
            else:
                where += f" (stacks in {self._path})"
            _log.error("lane_stacks", why=why, where=where)
            return where

    async def _add_of_others(self, rendezvous: Rendezvous, found: dict[int, str]) -> None:
        found.update(await rendezvous.stacks())

    def _append(self, why: str, found: Mapping[int, str]) -> None:
        most = max(_RANK_CHARACTERS_MIN, min(CHARACTERS_MAX, _DUMP_CHARACTERS // max(1, len(found))))
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        text = "".join(f"rank {rank}:\n{stacks[:most]}\n" for rank, stacks in found.items())
        descriptor = open_to_append(self._path)
        try:
            if os.fstat(descriptor).st_size > _FILE_BYTES_MAX:  # others append to it too, so that it is no other file
                kept = self._path.read_bytes()[-_FILE_BYTES_MAX // 2 :]
                os.ftruncate(descriptor, 0)
                os.write(descriptor, kept)
            os.write(descriptor, f"{moment} the lane: {why}\n{text}\n".encode(errors="replace"))
        finally:
            os.close(descriptor)


def _stacks_here(pid: int) -> dict[int, str]:
    return stacks_of(ranks_of(pid) or {0: pid})
