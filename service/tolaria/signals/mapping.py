"""The board's file: creation, adoption, attachment, shared mapping, locks on its blocks, removal of stale boards.

The creator of a board holds a lock on the header as long as it lives. It writes a new board to `<name>.new`, whose
header it locks first, and renames it: no process sees half a board, and one process at a time creates. A file found
under the name
  - is refused when its header is locked: it belongs to a living run;
  - is adopted when it is of the same run and boot: a restart clears no emergency, and peers stay attached;
  - is replaced when it is of another run, boot or version, or damaged: attached peers see that it lost its name;
  - is refused and left alone when it is not a board.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import stat
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tolaria.errors import BoardBusyError, BoardLostError, BoardRefusedError
from tolaria.signals import layout

STALE_NAMES = "tolaria-*"
STALE_S = 600.0
"""Twice the five minutes that Kubernetes waits at most before it restarts a crashing container."""

_MODE = 0o600
_TRIES = 100
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid


class BoardMemory:
    """A shared mapping of the whole board; takes over the descriptor `fd`, whose file has the board's size.

    `view` are the bytes, `words` native 64-bit words: an assignment is one aligned 8-byte store and a look-up one load.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._map = mmap.mmap(fd, layout.BOARD_SIZE)
        self._file_size = self._map.size
        self.closed = False
        self.view = memoryview(self._map)
        self.words = self.view.cast("Q")

    @property
    def intact(self) -> bool:
        """Whether the file behind the mapping has its size: touching a page that was cut off is a SIGBUS. 0.5 us."""
        return not self.closed and self._file_size() >= layout.BOARD_SIZE

    @property
    def named(self) -> bool:
        """Whether the file still has a name; a board that was removed or replaced has none."""
        return not self.closed and os.fstat(self._fd).st_nlink > 0

    def unlink(self) -> None:
        """Removes the file, unless its path leads to another one by now."""
        with _translated(self._path):
            if _leads_to(self._path, self._fd):
                self._path.unlink()

    def require_intact(self) -> None:
        """Raises `BoardLostError` unless `intact`."""
        if self.closed:
            raise BoardLostError(f"{self._path}: this board has been closed")
        if self._file_size() < layout.BOARD_SIZE:
            raise BoardLostError(f"{self._path}: the file was cut short")

    def close(self) -> None:
        """Unmaps. No thread may use the board afterwards."""
        self.closed = True
        self.words.release()
        self.view.release()
        self._map.close()
        os.close(self._fd)


def locked_fence() -> None:
    """A full memory barrier: a lock's release followed by another's acquire, which aarch64 keeps in order. 0.2 us."""
    for lock in (threading.Lock(), threading.Lock()):
        lock.acquire()
        lock.release()


fence = None if platform.machine() in {"x86_64", "AMD64"} else locked_fence
"""Called between steps whose order matters. None on x86-64, which keeps the order of loads and of stores; calls into
CPython keep the compiler from reordering them."""


class RangeLocks:
    """Exclusive locks on byte ranges of the file behind `fd`, which this takes over.

    The kernel drops a lock when its holder dies, and compares holders across pid namespaces. On Linux a lock belongs
    to an open file, which forked children would keep open: they close it at once. `fd` must not be the descriptor of
    a mapping, which would keep the open file alive in children. `held` is False once closed, and in forked children.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._ranges: set[tuple[int, int]] = set()
        self.held = True
        _open_locks.add(self)

    def try_lock(self, start: int, length: int) -> bool:
        """Locks a range unless part of it is locked by another holder, or the range by this one."""
        if not self.held or (start, length) in self._ranges:
            return False
        try:
            _set_lock(self._fd, fcntl.F_WRLCK, start, length)
        except (BlockingIOError, PermissionError):  # both mean "held by another"
            return False
        self._ranges.add((start, length))
        return True

    def unlock(self, start: int, length: int) -> None:
        """Unlocks a range."""
        if self.held:
            self._ranges.discard((start, length))
            _set_lock(self._fd, fcntl.F_UNLCK, start, length)

    def close(self) -> None:
        """Unlocks everything. Closing again is harmless."""
        if self.held:
            self.held = False
            os.close(self._fd)


_open_locks: weakref.WeakSet[RangeLocks] = weakref.WeakSet()


def _close_in_child() -> None:
    for locks in list(_open_locks):
        locks.close()


os.register_at_fork(after_in_child=_close_in_child)


def _set_lock(fd: int, kind: int, start: int, length: int) -> None:
    if sys.platform == "linux":
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    else:  # record locks do not see a second holder within one process, but see every other process
        fcntl.lockf(fd, fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)


@dataclass(frozen=True, slots=True)
class BoardFile:
    """An open board: `fd` to map, `locks` (on a separate open file) to own blocks with, and its header."""

    fd: int
    locks: RangeLocks
    header: layout.Header
    adopted: bool


def create_file(path: Path, run_id: str) -> BoardFile:
    """Creates or adopts a board; raises as `SignalBoard.create` does."""
    header = layout.Header(run_id, boot_id(), time.time_ns(), time.monotonic_ns())
    image = layout.blank_board(header)
    with _translated(path), ExitStack() as replaced, ExitStack() as undo:
        new = path.with_name(path.name + ".new")
        locks = _lock_named(new, os.O_CREAT)
        undo.callback(locks.close)
        undo.callback(new.unlink, missing_ok=True)
        adopted = _adopt(path, header, replaced)
        if adopted is not None:
            return adopted
        fd = os.open(new, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        undo.callback(os.close, fd)
        os.fchmod(fd, _MODE)  # whatever the umask, or the mode that a crash left
        os.ftruncate(fd, 0)
        os.pwrite(fd, image, 0)  # written, not only sized: a full file system shows now, not as a SIGBUS later
        new.rename(path)
        undo.pop_all()
        return BoardFile(fd, locks, header, adopted=False)


def attach_file(path: Path, expected_run_id: str | None) -> BoardFile:
    """Opens the board of another process; raises as `SignalBoard.attach` does."""
    with _translated(path), ExitStack() as undo:
        fd = _open(path)
        undo.callback(os.close, fd)
        lock_fd = _open(path)
        undo.callback(os.close, lock_fd)
        if not os.path.sameopenfile(fd, lock_fd):
            raise BoardRefusedError(str(path), "replaced", "its file was replaced meanwhile; try again")
        header = _checked_header(path, fd)
        if expected_run_id is not None and header.run_id != expected_run_id:
            raise BoardRefusedError(str(path), "run", f"it belongs to run {header.run_id!r}, not {expected_run_id!r}")
        undo.pop_all()
        return BoardFile(fd, RangeLocks(lock_fd), header, adopted=False)


def remove_stale_boards(beside: Path, *, stale_s: float = STALE_S) -> tuple[Path, ...]:
    """Removes the boards of dead runs in the folder of the board `beside` and returns their paths. Does file I/O.

    A board is stale if its name is `tolaria-...`, it is an intact board of this version and of this user, it has mode
    0600 and a single link, no living process holds a lock on it, and its creation and last heartbeat were more than
    `stale_s` seconds ago: until then a restart of its run adopts it. Files that cannot be read or removed are left
    alone, and the folder is not searched unless the name of `beside` is `tolaria-...`.
    """
    if not beside.match(STALE_NAMES):
        return ()
    # `beside` is locked by this process, which not every platform's locks distinguish from unlocked.
    candidates = [path for path in sorted(beside.parent.glob(STALE_NAMES)) if path != beside]
    return tuple(path for path in candidates if _removed(path, stale_s))


def _removed(path: Path, stale_s: float) -> bool:
    with ExitStack() as opened, suppress(OSError, BoardRefusedError):
        fd = _open(path)
        locks = RangeLocks(fd)
        opened.callback(locks.close)
        file = os.fstat(fd)
        private = file.st_uid == os.geteuid() and stat.S_IMODE(file.st_mode) == _MODE and file.st_nlink == 1
        if not private or not locks.try_lock(0, layout.BOARD_SIZE):
            return False
        # Creating a board under this name needs the lock that is held here: the name cannot change any more.
        if _quiet_s(path, fd) < stale_s or not _leads_to(path, fd):
            return False
        path.unlink()
        return True
    return False


def _quiet_s(path: Path, fd: int) -> float:
    """Returns the seconds since creation or the last heartbeat; infinity for a board of an earlier boot."""
    header = _checked_header(path, fd)
    if header.boot_id != boot_id():
        return float("inf")
    beat_ns = int.from_bytes(os.pread(fd, 8, layout.participant_at(0) + layout.HEARTBEAT), "little")
    return (time.monotonic_ns() - max(header.created_ns, beat_ns)) / 1e9


def boot_id() -> bytes:
    """Returns the id of this boot of the kernel; zeros where it has none."""
    try:
        return bytes.fromhex(_BOOT_ID.read_text(encoding="ascii").strip().replace("-", ""))
    except FileNotFoundError:
        return bytes(16)


def _lock_named(path: Path, flags: int) -> RangeLocks:
    """Opens `path` and locks its header, making sure that the locked file is the one that has the name."""
    for _ in range(_TRIES):
        fd = _open(path, flags)
        locks = RangeLocks(fd)
        if not locks.try_lock(0, layout.HEADER_SIZE):
            locks.close()
            raise BoardBusyError(f"{path}: another living process holds this board")
        if _leads_to(path, fd):
            return locks
        locks.close()
    raise BoardBusyError(f"{path}: other processes keep replacing this board")


def _adopt(path: Path, header: layout.Header, replaced: ExitStack) -> BoardFile | None:
    """Returns the board found at `path` if it can be adopted; keeps one that is to be replaced locked in `replaced`."""
    try:
        locks = _lock_named(path, 0)
    except FileNotFoundError:
        return None
    with ExitStack() as release:
        release.callback(locks.close)
        fd = _open(path)
        release.callback(os.close, fd)
        try:
            found = _checked_header(path, fd)
        except BoardRefusedError as refusal:
            if refusal.reason == "foreign":
                raise
            found = None
        if found is None or (found.run_id, found.boot_id) != (header.run_id, header.boot_id):
            replaced.push(release.pop_all())
            return None
        os.fchmod(fd, _MODE)
        release.pop_all()
        return BoardFile(fd, locks, found, adopted=True)


def _checked_header(path: Path, fd: int) -> layout.Header:
    """Reads with pread: a mapping of a file that is too short raises SIGBUS."""
    return layout.decode_header(str(path), os.pread(fd, layout.HEADER_SIZE, 0), os.fstat(fd).st_size)


def _open(path: Path, flags: int = 0) -> int:
    """Opens `path` to read and write without following a link."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, _MODE)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BoardRefusedError(str(path), "foreign", "it is not a regular file")
    return fd


def _leads_to(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Translates errors of the file system to `BoardRefusedError`, and refuses big-endian machines."""
    if sys.byteorder != "little":
        raise BoardRefusedError(str(path), "platform", "boards need a little-endian machine")
    try:
        yield
    except FileNotFoundError as cause:
        raise BoardRefusedError(str(path), "missing", "there is no such file or directory") from cause
    except OSError as cause:
        raise BoardRefusedError(str(path), "io", cause.strerror or str(cause)) from cause
