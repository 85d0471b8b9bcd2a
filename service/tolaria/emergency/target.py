"""The process that the sentinel watches: whether it lives, and signals to it.

Owns the handle. On Linux that is a pidfd: it never means another process that has got the same number since.
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Self


class ServiceProcess:
    """A living process; a context manager. `while_open` is a file descriptor whose end counts as the process's.

    Raises ProcessLookupError when there is no such process.
    """

    def __init__(self, pid: int, *, while_open: int | None) -> None:
        self.pid = pid
        self._pidfd: int | None = None
        if sys.platform == "linux":
            self._pidfd = os.pidfd_open(pid)
        else:
            os.kill(pid, 0)
        self._selector = selectors.DefaultSelector()
        for fd in (self._pidfd, while_open):
            if fd is not None:
                self._selector.register(fd, selectors.EVENT_READ)

    def ended_within(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s`; whether it has ended, or whoever started us wants us to."""
        if not self._selector.get_map():
            time.sleep(timeout_s)
        elif any(self._says_end(key.fd) for key, _ in self._selector.select(timeout_s)):
            return True
        return self._pidfd is None and not _exists(self.pid)

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when it has ended."""
        with suppress(ProcessLookupError):
            if sys.platform == "linux" and self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            else:
                os.kill(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the handle go; the process is left alone."""
        self._selector.close()
        if self._pidfd is not None:
            os.close(self._pidfd)

    def _says_end(self, fd: int) -> bool:
        """A readable pidfd means that the process has ended; the other descriptor has ended when it reads empty."""
        return fd == self._pidfd or not os.read(fd, 4096)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
