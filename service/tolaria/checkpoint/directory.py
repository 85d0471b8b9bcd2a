"""The names in a state directory, and its lock: it serves one process at a time."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from tolaria import forks
from tolaria.errors import StateHeldError, StateRefusedError

JOURNAL: Final = "journal.sqlite3"
CHECKPOINTS: Final = "checkpoints"
QUARANTINE: Final = "quarantine"
"""What is damaged is moved there."""
SETTINGS: Final = "settings.json"
"""The settings of the newest run's last process, without secrets."""
RUN_SETTINGS: Final = "runs"
"""The folder with the settings of each run's last process, as `<run id>.json`."""
PEERS: Final = "peers"
"""What the embedded peers keep for after a restart."""
BACKUPS: Final = "backups"
"""Copies from before an upgrade or a downgrade."""
LOCK: Final = "lock"

_DEAD_HOLDER_S: Final = 5.0
_LOCK_POLL_S: Final = 0.05


@contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """Holds the lock of an existing state directory, which the system releases however the process ends.

    Raises:
        StateHeldError: another process holds it.
        OSError: the lock cannot be created.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = forks.keep_private(os.open(directory / LOCK, flags, 0o600))
    try:
        _lock(directory, descriptor)
        with suppress(OSError):  # a full disk: the lock holds, but its holder's pid is unknown
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        forks.close(descriptor)


def require_state(directory: Path, origin: str) -> None:
    """Checks that a directory holds a state. Raises StateRefusedError, whose message begins with `origin`."""
    if not directory.is_dir():
        raise StateRefusedError(f"{origin}: there is no directory {directory}")
    if not (directory / JOURNAL).is_file():
        raise StateRefusedError(f"{origin}: {directory} holds no {JOURNAL}: no service has kept its state there")


def _lock(directory: Path, descriptor: int) -> None:
    """Takes the lock. Waits for a holder that has ended already: the system takes a while to close its files."""
    until_s = time.monotonic() + _DEAD_HOLDER_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            written = os.pread(descriptor, 32, 0).strip()
            holder = int(written) if written.isdigit() else 0
            if _is_alive(holder) or time.monotonic() >= until_s:
                raise StateHeldError(str(directory), holder) from None
            time.sleep(_LOCK_POLL_S)
        else:
            if not os.path.samestat(os.fstat(descriptor), (directory / LOCK).stat()):
                raise StateHeldError(str(directory), 0)  # its holder has removed it, and another one has created it
            return


def remove_unused(directory: Path) -> None:
    """Removes a directory with nothing but the lock, which this process holds."""
    with suppress(OSError):
        if [path.name for path in directory.iterdir()] == [LOCK]:
            (directory / LOCK).unlink()
            directory.rmdir()


def _is_alive(pid: int) -> bool:
    """Whether the process exists and has not ended; True for an unknown process and where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2][1] not in "ZX"
    except FileNotFoundError:
        return not pid or not Path("/proc/self/stat").exists()
