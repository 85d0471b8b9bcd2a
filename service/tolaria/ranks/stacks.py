"""The Python stacks of the lane's processes: each dumps its own into memory, from where its machine reads them.

A dump is made by a handler in C, so that it needs no GIL, and it leaves nothing on the disk of the machine. All texts
are bounded.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from tolaria.ranks.local_ranks import state_of
from tolaria.signals.lane_page import STACKS_SIGNAL

CHARACTERS_MAX: Final = 12_000
"""Characters of one process's stacks: about 150 frames."""

_MEMORY: Final = "tolaria-stacks"
_ANSWER_S: Final = 1.0
_QUIET_S: Final = 0.05
_POLL_S: Final = 0.01
_PLACES_MAX: Final = 8
_RANKS_SHOWN: Final = 6
_CURRENT: Final = "Current thread"
_THREADS: Final = re.compile(r"^(?=Thread |Current thread )", re.MULTILINE)
_FRAME: Final = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<name>.*)$', re.MULTILINE)


def dump_on_request() -> None:
    """Has `STACKS_SIGNAL` dump the stacks of all threads of this process into memory that `stacks_of` reads."""
    descriptor = os.memfd_create(_MEMORY, os.MFD_CLOEXEC)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)  # a reader empties it
    faulthandler.register(STACKS_SIGNAL, descriptor, all_threads=True, chain=False)


def stacks_of(pids: Mapping[int, int]) -> dict[int, str]:
    """Returns the stacks of processes, by rank as `pids` are; that of the main thread is first.

    In place of the stacks of a process that gives none, the text says why. Blocks for up to a second.
    """
    found, open_memory = dict[int, str](), dict[int, int]()
    for rank, pid in pids.items():
        try:
            open_memory[rank] = _request(pid)
        except OSError as error:
            found[rank] = f"no stacks of process {pid}: {error.strerror or error}"
    sizes, until_s = dict.fromkeys(open_memory, 0), time.monotonic() + _ANSWER_S
    while open_memory and time.monotonic() < until_s:
        time.sleep(_QUIET_S if all(sizes.values()) else _POLL_S)
        now = {rank: os.fstat(descriptor).st_size for rank, descriptor in open_memory.items()}
        if now == sizes and all(now.values()):
            break
        sizes = now
    for rank, descriptor in open_memory.items():
        found[rank] = _taken(descriptor) or f"no stacks of process {pids[rank]} within {_ANSWER_S:g} s"
    return dict(sorted(found.items()))


def summary(stacks: Mapping[int, str]) -> str:
    """Returns in one line where the main threads of the ranks are; ranks at the same place are named together."""
    if len(stacks) == 1:
        return _place(*stacks.values())
    places = dict[str, list[int]]()
    for rank, text in stacks.items():
        places.setdefault(_place(text), []).append(rank)
    said = [f"{_ranks(ranks)}: {place}" for place, ranks in places.items()]
    return "; ".join([*said[:_PLACES_MAX], *(["..."] if len(said) > _PLACES_MAX else [])])


def _request(pid: int) -> int:
    """Has a process dump its stacks; returns a descriptor of the memory with them. Raises OSError if it cannot."""
    if not _catches(pid):  # the signal would end it
        raise OSError("it has just begun, or is none of the lane's")
    folder = Path(f"/proc/{pid}/fd")
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # a descriptor that has been closed meanwhile
            if path.readlink().name.startswith(f"memfd:{_MEMORY}"):
                if (state := state_of(pid)) in {"T", "t"}:
                    raise OSError(f"it is stopped (state {state})")
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                os.ftruncate(descriptor, 0)
                os.kill(pid, STACKS_SIGNAL)
                return descriptor
    raise OSError("it has no memory for them")


def _catches(pid: int) -> bool:
    """Whether a process has a handler of the signal."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1)
    return False


def _taken(descriptor: int) -> str:
    """Returns what lies in the memory, bounded, and empties it."""
    try:
        content = os.pread(descriptor, 100 * CHARACTERS_MAX, 0)
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)
    threads = _THREADS.split(content.decode("ascii", errors="replace"))
    threads.sort(key=lambda thread: not thread.startswith(_CURRENT))  # the handler lists the newest thread first
    text = "\n".join(thread.strip() for thread in threads if thread.strip())
    return text if len(text) <= CHARACTERS_MAX else f"{text[:CHARACTERS_MAX]}\n..."


def _place(stacks: str) -> str:
    if (frame := _FRAME.search(stacks)) is None:
        return stacks.partition("\n")[0]
    return f"{frame['name']} ({Path(frame['file']).name}:{frame['line']})"


def _ranks(ranks: Iterable[int]) -> str:
    numbers = [*ranks]
    more = f" and {len(numbers) - _RANKS_SHOWN} more" if len(numbers) > _RANKS_SHOWN else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_RANKS_SHOWN]))}{more}"
