"""Where a board's file comes from: made, adopted, replaced or joined. Owns the file's name; knows no blocks.

The founder of a board holds a lock on its header for as long as it lives. A new board is written whole under
`<name>.new`, whose header is locked first, and renamed: so nobody ever sees half a board, only one process at a time
founds, and what a crash leaves under `.new` is used again. A board found under the name
  - with its header locked belongs to a living run: refused;
  - of the same run and boot is adopted as it stands: a restart takes back no emergency, and peers stay attached;
  - of another run, boot or version, or damaged, is replaced: peers still attached to it see that it lost its name;
  - which is no board at all is left alone: refused, for it may be somebody's file.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tolaria.errors import BoardBusyError, BoardRefusedError
from tolaria.signals.layout import HEADER_SIZE, blank_board, decode_header, header_fault
from tolaria.signals.locks import RangeLocks
from tolaria.signals.records import Header

if TYPE_CHECKING:
    from collections.abc import Iterator

MODE = 0o600
_TRIES = 100
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class BoardFile:
    """An open board: `fd` to map, `locks` to own blocks with (a separate open file), and its header."""

    fd: int
    locks: RangeLocks
    header: Header
    adopted: bool


def found(path: Path, run_id: str) -> BoardFile:
    """Make the board of `run_id` at `path`, or adopt the one that a crash of the same run left there.

    Raises `BoardBusyError` while another living process is the founder, `BoardRefusedError` when the name cannot be
    had.
    """
    header = Header(run_id, boot_id(), time.time_ns(), time.monotonic_ns())
    image = blank_board(header)
    with _translated(path), ExitStack() as replaced, ExitStack() as undo:
        new = path.with_name(path.name + ".new")
        locks = _own(new, os.O_CREAT)
        undo.callback(locks.close)
        undo.callback(new.unlink, missing_ok=True)
        left = _left_behind(path, header, replaced)
        if left is not None:
            return left
        fd = os.open(new, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        undo.callback(os.close, fd)
        os.fchmod(fd, MODE)  # the umask must not decide, nor what a crash left
        os.ftruncate(fd, 0)
        os.pwrite(fd, image, 0)  # written, not only sized: a full file system must show now, not as a SIGBUS later
        new.rename(path)
        undo.pop_all()
        return BoardFile(fd, locks, header, adopted=False)


def join(path: Path, expected_run_id: str | None) -> BoardFile:
    """Open the board that another process founded. Raises `BoardRefusedError`; its `reason` says why."""
    with _translated(path), ExitStack() as undo:
        fd = open_board(path)
        undo.callback(os.close, fd)
        lock_fd = open_board(path)
        undo.callback(os.close, lock_fd)
        if not _same(os.fstat(fd), os.fstat(lock_fd)):
            raise BoardRefusedError(str(path), "replaced", "its file was replaced at this moment; ask again")
        header = checked_header(path, fd)
        if expected_run_id is not None and header.run_id != expected_run_id:
            raise BoardRefusedError(str(path), "run", f"it belongs to run {header.run_id!r}, not {expected_run_id!r}")
        undo.pop_all()
        return BoardFile(fd, RangeLocks(lock_fd), header, adopted=False)


def remove(path: Path, fd: int) -> None:
    """Take the name away from the board open as `fd`, unless the name leads elsewhere by now."""
    with _translated(path):
        if leads_to(path, fd):
            path.unlink()


def _own(path: Path, flags: int) -> RangeLocks:
    """Open `path` and lock its header, making sure that the locked file is the one that still has the name."""
    for _ in range(_TRIES):
        fd = open_board(path, flags)
        locks = RangeLocks(fd)
        if not locks.try_lock(0, HEADER_SIZE):
            locks.close()
            raise BoardBusyError(f"{path}: another living process holds this board")
        if leads_to(path, fd):
            return locks
        locks.close()
    raise BoardBusyError(f"{path}: other processes keep replacing this board")


def _left_behind(path: Path, header: Header, replaced: ExitStack) -> BoardFile | None:
    """Own the board found at `path`, if any: returned when it is ours to adopt, else kept by `replaced`."""
    try:
        locks = _own(path, 0)
    except FileNotFoundError:
        return None
    with ExitStack() as release:
        release.callback(locks.close)
        fd = open_board(path)
        release.callback(os.close, fd)
        if not _is_ours(path, fd, header):
            replaced.push(release.pop_all())
            return None
        os.fchmod(fd, MODE)
        release.pop_all()
        return BoardFile(fd, locks, checked_header(path, fd), adopted=True)


def _is_ours(path: Path, fd: int, header: Header) -> bool:
    try:
        found = checked_header(path, fd)
    except BoardRefusedError as refusal:
        if refusal.reason == "foreign":
            raise
        return False
    return found.run_id == header.run_id and found.boot_id == header.boot_id


def checked_header(path: Path, fd: int) -> Header:
    """The header of the file open as `fd`. Raises `BoardRefusedError` when it is no board.

    Read with pread, never through a map: a file that is too short must not become a SIGBUS.
    """
    head = os.pread(fd, HEADER_SIZE, 0)
    fault = header_fault(head, os.fstat(fd).st_size)
    if fault is not None:
        raise BoardRefusedError(str(path), *fault)
    return decode_header(head)


def open_board(path: Path, flags: int = 0) -> int:
    """A descriptor to read and write `path`, no link followed. Raises `OSError`, or `BoardRefusedError` for no file."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, MODE)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BoardRefusedError(str(path), "foreign", "it is not a regular file")
    return fd


def leads_to(path: Path, fd: int) -> bool:
    """Whether the name belongs to the file open as `fd`."""
    try:
        return _same(path.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def boot_id() -> bytes:
    """Names this boot of the kernel; zeros where it has no name."""
    try:
        return bytes.fromhex(_BOOT_ID.read_text(encoding="ascii").strip().replace("-", ""))
    except FileNotFoundError:
        return bytes(16)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Name the board in every error of the file system, and refuse machines whose words are not as the layout says."""
    if sys.byteorder != "little":
        raise BoardRefusedError(str(path), "platform", "boards need a little-endian machine")
    try:
        yield
    except FileNotFoundError as cause:
        raise BoardRefusedError(str(path), "missing", "there is no such file or directory") from cause
    except OSError as cause:
        raise BoardRefusedError(str(path), "io", cause.strerror or str(cause)) from cause
