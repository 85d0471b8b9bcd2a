"""The board's bytes in memory. Owns the map, single-word access and memory order; not what the words mean."""

from __future__ import annotations

import mmap
import os
import platform
import threading
from typing import TYPE_CHECKING

from tolaria.errors import BoardLostError
from tolaria.signals.layout import BOARD_SIZE

if TYPE_CHECKING:
    from pathlib import Path


class BoardMemory:
    """A shared map of the whole board; takes over the file descriptor `fd`, whose file has the board's size.

    `words` are its native 64-bit words: an assignment to one compiles to one aligned 8-byte store and a look at one
    to one load (struct's "<Q" would go byte by byte). `view` are its bytes.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._map = mmap.mmap(fd, BOARD_SIZE)
        self._file_size = self._map.size
        self._closed = False
        self.view = memoryview(self._map)
        self.words = self.view.cast("Q")

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def intact(self) -> bool:
        """Whether the file behind the map is still whole: to touch a page that was cut off would be a SIGBUS.

        Half a microsecond. A file cut between this look and the touch still kills; nobody who keeps to the protocol
        cuts one.
        """
        return not self._closed and self._file_size() >= BOARD_SIZE

    @property
    def named(self) -> bool:
        """Whether the file still has a name: a board that was removed or replaced has none."""
        return not self._closed and os.fstat(self._fd).st_nlink > 0

    def require_intact(self) -> None:
        """Raise `BoardLostError` when the memory must not be touched any more: `intact`, on the way of every signal."""
        if self._closed:
            raise BoardLostError(f"{self._path}: this board has been closed")
        if self._file_size() < BOARD_SIZE:
            raise BoardLostError(f"{self._path}: the file was cut short")

    def close(self) -> None:
        """Unmap. No thread may be using the board any more."""
        self._closed = True
        self.words.release()
        self.view.release()
        self._map.close()
        os.close(self._fd)


def locked_fence() -> None:
    """A full memory barrier made of what Python has: a lock's release followed by another's acquire.

    On aarch64 both are single release and acquire instructions, which the architecture keeps in order; about 0.2 us.
    """
    with threading.Lock():  # noqa: PLW2101  (wanted for its effect on memory, not for exclusion)
        pass
    with threading.Lock():  # noqa: PLW2101  (as above)
        pass


fence = None if platform.machine() in {"x86_64", "AMD64"} else locked_fence
"""What to call between two steps whose order matters. None: x86-64 keeps loads and stores each in order, and CPython's
calls keep the compiler from swapping them."""
