"""The system calls that durable files need, each of which can be made to fail. Owns the order of a safe write.

Knows nothing of what the files hold. Every error is the system's own `OSError`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path


class Filesystem:
    """The calls themselves. A subclass in a test fails the one that it wants to fail."""

    def make_directory(self, path: Path) -> None:
        """Create one directory (0700), its parent being there."""
        path.mkdir(mode=0o700)

    def create(self, path: Path) -> int:
        """Create a file (0600) that was not there and open it for writing; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, content: memoryview) -> int:
        """Write; returns how many bytes were taken, perhaps not all."""
        return os.write(descriptor, content)

    def sync(self, descriptor: int) -> None:
        """Bring a file's bytes to the disk."""
        os.fsync(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Bring a directory's names to the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename atomically; an empty directory or a file of that name is replaced."""
        source.rename(target)

    def open(self, path: Path) -> int:
        """Open a file for reading; returns its descriptor."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, descriptor: int, buffer: memoryview) -> int:
        """Read up to the buffer's length; returns how many bytes came, 0 at the end."""
        return os.readv(descriptor, [buffer])

    def size_bytes(self, descriptor: int) -> int:
        """The open file's length."""
        return os.fstat(descriptor).st_size

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def names(self, path: Path) -> list[str]:
        """What a directory holds, sorted."""
        return sorted(entry.name for entry in path.iterdir())

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and everything in it."""
        shutil.rmtree(path)


def write_durably(files: Filesystem, path: Path, pieces: Iterable[memoryview]) -> int:
    """Create a file of the pieces, one after the other, and bring its bytes to the disk; returns its length in bytes.

    The name is on the disk only after a `sync_directory`. On an error the file may be there in part.
    """
    descriptor = files.create(path)
    written_bytes = 0
    try:
        for piece in pieces:
            rest = piece
            while rest.nbytes:
                taken = files.write(descriptor, rest[:_PIECE_BYTES])
                written_bytes += taken
                rest = rest[taken:]
        files.sync(descriptor)
    finally:
        files.close(descriptor)
    return written_bytes


def read_all(files: Filesystem, path: Path, limit_bytes: int) -> bytes:
    """The whole file.

    Raises:
        ValueError: when it is longer than `limit_bytes`; nothing has been read then.
    """
    descriptor = files.open(path)
    try:
        size_bytes = files.size_bytes(descriptor)
        if size_bytes > limit_bytes:
            raise ValueError(f"{path}: {size_bytes} bytes are more than the {limit_bytes} expected")
        content = bytearray(size_bytes)
        read_exactly(files, descriptor, memoryview(content))
        return bytes(content)
    finally:
        files.close(descriptor)


def read_exactly(files: Filesystem, descriptor: int, buffer: memoryview) -> None:
    """Fill the buffer.

    Raises:
        EOFError: when the file ends before.
    """
    filled = 0
    while filled < buffer.nbytes:
        taken = files.read_into(descriptor, buffer[filled:])
        if taken == 0:
            raise EOFError(f"the file ends {buffer.nbytes - filled} bytes early")
        filled += taken


def remove_quietly(files: Filesystem, path: Path) -> None:
    """Remove a tree if the system lets us: for leftovers that the next start removes anyway."""
    with contextlib.suppress(OSError):
        files.remove_tree(path)


_PIECE_BYTES = 4 * 2**20
"""One write call: large enough for full speed, small enough that a failing disk shows soon."""
