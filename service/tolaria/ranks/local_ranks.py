"""The processes of the ranks on this machine, as /proc shows them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_RANK_PROGRAM: Final = b"tolaria.lane.rank"
_RANK_VARIABLE: Final = b"RANK="
_ENDED: Final = {"Z", "X"}


def children_of(pid: int) -> list[int]:
    """Returns the ids of the processes that a process has started and that it has not waited for."""
    found = list[int]()
    with suppress(OSError):  # the process has ended meanwhile
        for children in (_PROC / str(pid) / "task").glob("*/children"):
            with suppress(OSError):
                found += map(int, children.read_text(encoding="ascii").split())
    return found


def ranks_of(agent: int) -> dict[int, int]:
    """Returns the process ids of the running ranks that an agent has started, by rank."""
    found = dict[int, int]()
    for pid in children_of(agent):
        folder = _PROC / str(pid)
        with suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            rank = next((each for each in variables if each.startswith(_RANK_VARIABLE)), b"")
            if rank and _RANK_PROGRAM in (folder / "cmdline").read_bytes() and state_of(pid) not in _ENDED:
                found[int(rank.removeprefix(_RANK_VARIABLE))] = pid
    return found


def state_of(pid: int) -> str:
    """Returns the letter for the state of a process, such as "T" for a stopped one. Raises OSError if it has gone."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
