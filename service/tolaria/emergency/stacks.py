"""Stack dumps on request, even of a process whose interpreter is held: the service's side and the asker's.

Owns the signal and the file. Must not know who asks, or why.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DUMP_SIGNAL = signal.SIGUSR1
_CAUGHT = re.compile(r"^SigCgt:\s*([0-9a-f]+)$", re.MULTILINE)


@contextmanager
def register_stack_dump(path: Path) -> Iterator[None]:
    """While the block runs, SIGUSR1 appends the stacks of all threads to the file at `path` (mode 0600).

    The dump is written by a handler in C, which needs no GIL: it shows where a thread is that holds it. Call from the
    main thread. Raises OSError when the file cannot be had.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        # What unregistering goes back to: a late request must not end the process, as SIGUSR1 does by default.
        signal.signal(DUMP_SIGNAL, signal.SIG_IGN)
        faulthandler.register(DUMP_SIGNAL, fd, all_threads=True, chain=False)
        try:
            yield
        finally:
            faulthandler.unregister(DUMP_SIGNAL)
    finally:
        os.close(fd)


def handles_dump(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1; without one the signal would end it. False where that is not told.

    Read from /proc, so on Linux only.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    caught = _CAUGHT.search(status)
    return caught is not None and bool(int(caught[1], 16) >> (DUMP_SIGNAL - 1) & 1)


def mark(path: Path, line: str) -> None:
    """Append a line before a dump, to tell one from the other. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"\n{line}\n".encode())
    finally:
        os.close(fd)
