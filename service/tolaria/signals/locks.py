"""Who owns what on the board: locks on ranges of its file. Owns nothing else; knows only offsets.

A lock says "a living process owns this block": the kernel drops it when its holder dies, however it dies, and keeps
it across pid namespaces, where a recorded pid would mean nothing or somebody else. Linux ties such a lock to an open
file, which a forked child would keep open (a data loader's worker, say): so children close it at once.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import weakref

_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid


class RangeLocks:
    """Exclusive locks on byte ranges of the file behind `fd`, which this takes over.

    `fd` must not be the descriptor of a map: a map keeps its open file, and with it the locks, alive in forked
    children.
    """

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd
        self.held = True
        """False once closed, and in a child forked from the owner: then nothing is owned any more."""
        _alive.add(self)

    def try_lock(self, start: int, length: int) -> bool:
        """Lock a range unless another holder has a part of it. Locking what is held already succeeds."""
        if self._fd is None:
            return False
        try:
            _lock(self._fd, start, length)
        except (BlockingIOError, PermissionError):  # both are ways to say "held by another"
            return False
        return True

    def unlock(self, start: int, length: int) -> None:
        """Let a range go."""
        if self._fd is not None:
            _unlock(self._fd, start, length)

    def close(self) -> None:
        """Let everything go."""
        if self._fd is not None:
            self.held = False
            os.close(self._fd)
            self._fd = None


_alive: weakref.WeakSet[RangeLocks] = weakref.WeakSet()


def _close_in_child() -> None:
    for locks in list(_alive):
        locks.close()


os.register_at_fork(after_in_child=_close_in_child)

if sys.platform == "linux":

    def _lock(fd: int, start: int, length: int) -> None:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0))

    def _unlock(fd: int, start: int, length: int) -> None:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, start, length, 0))

else:  # record locks do not see a second holder within one process, but see every other process

    def _lock(fd: int, start: int, length: int) -> None:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)

    def _unlock(fd: int, start: int, length: int) -> None:
        fcntl.lockf(fd, fcntl.LOCK_UN, length, start)
