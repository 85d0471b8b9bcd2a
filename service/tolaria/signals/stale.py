"""Boards that crashed runs have left behind, and their removal. Owns what counts as left behind, not what boards say.

A run that is killed cannot take its board away, and the next run, of another id, founds one of another name. A board
is left behind when all of this holds:
  - it lies beside ours, under a name of the same pattern, and is a whole board of this version;
  - it belongs to our user, with the mode that boards have, and has no second name;
  - no living process holds a lock on it: neither its founder nor a participant;
  - nobody has founded it or beaten on it for `STALE_S`: until then its run may be restarted, which adopts it with all
    the emergencies that stand on it.
"""

from __future__ import annotations

import os
import stat
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from tolaria.errors import BoardRefusedError
from tolaria.signals.founding import MODE, boot_id, checked_header, leads_to, open_board
from tolaria.signals.layout import BOARD_SIZE, HEARTBEAT, participant_at
from tolaria.signals.locks import RangeLocks

if TYPE_CHECKING:
    from pathlib import Path

NAMES = "tolaria-*"
STALE_S = 600.0
"""Twice the five minutes that Kubernetes waits at most before it restarts what crashes again and again."""


def remove_stale_boards(beside: Path, *, stale_s: float = STALE_S) -> tuple[Path, ...]:
    """Remove the boards left behind in the folder of the board `beside`; their paths.

    Only where that one is itself called `tolaria-...`: in a folder of another kind nothing is searched. `stale_s`:
    seconds since the last sign of life. What cannot be judged or removed is left alone. Does file I/O.
    """
    if not beside.match(NAMES):
        return ()
    # Ours is locked, but by this process itself, which not every platform's locks tell from nobody.
    candidates = [path for path in sorted(beside.parent.glob(NAMES)) if path != beside]
    return tuple(path for path in candidates if _removed(path, stale_s))


def _removed(path: Path, stale_s: float) -> bool:
    with ExitStack() as opened, suppress(OSError, BoardRefusedError):
        fd = open_board(path)
        locks = RangeLocks(fd)
        opened.callback(locks.close)
        if not _is_ours(os.fstat(fd)) or not locks.try_lock(0, BOARD_SIZE):
            return False
        # Whoever founds under this name needs the lock that we have: from here on the name leads where it does.
        if _quiet_s(path, fd) < stale_s or not leads_to(path, fd):
            return False
        path.unlink()
        return True
    return False


def _is_ours(file: os.stat_result) -> bool:
    return file.st_uid == os.geteuid() and stat.S_IMODE(file.st_mode) == MODE and file.st_nlink == 1


def _quiet_s(path: Path, fd: int) -> float:
    """Seconds since the last sign of life; endless for a board of an earlier boot, whose clock has ended."""
    header = checked_header(path, fd)
    if header.boot_id != boot_id():
        return float("inf")
    beat_ns = int.from_bytes(os.pread(fd, 8, participant_at(0) + HEARTBEAT), "little")
    return (time.monotonic_ns() - max(header.created_ns, beat_ns)) / 1e9
