"""Forks of this process, such as the workers of a `DataLoader`, which a job's code makes at any time.

A fork inherits every descriptor, the signal handlers and the locks as they are at that moment. Here is what must not
happen with them: a fork keeps a pipe, a lock on a file or a listening socket of the service open after its end; its
signals arrive at the event loop of the service, through the wake-up descriptor; a program that is being started waits
for a fork that has inherited the pipe on which it reports errors. Not concerned: programs that are started, which
inherit no descriptor (PEP 446).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import anyio

_POLL_S: Final = 0.001
_PR_SET_PDEATHSIG: Final = 1


class _Forks:
    """The state of the hooks that run around every fork of this process."""

    def __init__(self) -> None:
        self.private: dict[int, tuple[int, int]] = {}
        """Descriptors with device and inode of what they were opened for: the numbers are used again."""
        self.spawning = threading.Lock()

    def before(self) -> None:
        self.spawning.acquire()

    def after_in_parent(self) -> None:
        self.spawning.release()

    def after_in_child(self) -> None:
        self.spawning = threading.Lock()
        for descriptor, opened in self.private.items():
            with suppress(OSError):
                if _identity(descriptor) == opened:
                    os.close(descriptor)
        self.private.clear()
        if signal.set_wakeup_fd(-1) != -1:  # an event loop has installed handlers, which do nothing without it
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


_forks: Final = _Forks()
os.register_at_fork(before=_forks.before, after_in_parent=_forks.after_in_parent, after_in_child=_forks.after_in_child)


def keep_private(descriptor: int) -> int:
    """Closes the descriptor in every later fork, until `close`; returns it."""
    _forks.private[descriptor] = _identity(descriptor)
    return descriptor


def close(descriptor: int) -> None:
    """Closes a private descriptor here."""
    _forks.private.pop(descriptor, None)
    os.close(descriptor)


def keep_sockets_private(port: int) -> None:
    """Closes the sockets of this process that listen on a TCP port in every later fork. Does nothing without /proc.

    Reads files; call it while the sockets are open.
    """
    inodes = listening_inodes(port)
    for entry in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):
            if entry.readlink().name in inodes:
                keep_private(int(entry.name))


@asynccontextmanager
async def without_forks() -> AsyncIterator[None]:
    """Makes forks of other threads wait while the block runs, which starts a program. Waits without blocking."""
    while not _forks.spawning.acquire(blocking=False):  # noqa: ASYNC110 - a thread releases it
        await anyio.sleep(_POLL_S)
    try:
        yield
    finally:
        _forks.spawning.release()


def end_with(parent: int) -> None:
    """Has this process killed when the thread that started it ends, as far as the system can do that.

    Does so at once if `parent`, the process of that thread, has ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def listening_inodes(port: int) -> set[str]:
    """Returns the sockets that listen on the port, as the links in /proc name them."""
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(f"socket:[{fields[9]}]")
    return found
