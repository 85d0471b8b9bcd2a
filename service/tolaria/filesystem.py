"""System calls for durable files, replaceable in tests, and functions that write and read whole files with them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_PIECE_BYTES: Final = 4 * 2**20
"""Bytes per write call: large enough for full speed, small enough that a failing disk is noticed soon."""


class Filesystem:
    """The system calls, which raise `OSError`. Tests override the calls that should fail."""

    def make_directory(self, path: Path) -> None:
        """Creates one directory with mode 0700."""
        path.mkdir(mode=0o700)

    def create(self, path: Path) -> int:
        """Creates a new file with mode 0600, opens it for writing and returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, content: memoryview) -> int:
        """Writes to a file and returns the number of bytes written, which may be fewer than given."""
        return os.write(descriptor, content)

    def sync(self, descriptor: int) -> None:
        """Flushes a file's content to the disk."""
        os.fsync(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Flushes a directory's entries to the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Renames atomically, replacing a file or an empty directory."""
        source.rename(target)

    def open(self, path: Path) -> int:
        """Opens a file for reading and returns its descriptor."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, descriptor: int, buffer: memoryview) -> int:
        """Reads at most the buffer's length and returns the number of bytes read; 0 at the end of the file."""
        return os.readv(descriptor, [buffer])

    def size_bytes(self, descriptor: int) -> int:
        """Returns an open file's length."""
        return os.fstat(descriptor).st_size

    def close(self, descriptor: int) -> None:
        """Closes a descriptor."""
        os.close(descriptor)

    def names(self, path: Path) -> list[str]:
        """Returns a directory's entries, sorted."""
        return sorted(entry.name for entry in path.iterdir())

    def remove_tree(self, path: Path) -> None:
        """Removes a directory with everything in it."""
        shutil.rmtree(path)


def write_durably(files: Filesystem, path: Path, pieces: Iterable[memoryview]) -> int:
    """Creates a file from consecutive pieces, flushes it to the disk and returns its length.

    The file's name is durable only after a `sync_directory`. After an error a partial file may remain.
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
    """Returns a file's content. Raises ValueError, without reading, if it is longer than `limit_bytes`."""
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
    """Fills the buffer. Raises EOFError if the file ends early."""
    filled = 0
    while filled < buffer.nbytes:
        taken = files.read_into(descriptor, buffer[filled:])
        if taken == 0:
            raise EOFError(f"the file ends {buffer.nbytes - filled} bytes early")
        filled += taken


def open_to_append(path: Path) -> int:
    """Returns a descriptor of the file, created with mode 0600 if needed; follows no link. Raises OSError."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def remove_quietly(files: Filesystem, path: Path) -> None:
    """Removes a tree, ignoring errors; the next start removes whatever is left."""
    with contextlib.suppress(OSError):
        files.remove_tree(path)


def errno_name(error: OSError) -> str:
    """Returns the symbolic name of the error's number, such as ENOSPC; UNKNOWN without a number."""
    return errno.errorcode.get(error.errno or 0, "UNKNOWN")
