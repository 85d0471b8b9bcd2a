"""Room on the disk that is given up so that an emergency can be written to the journal of a full disk."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

RESERVE_BYTES: Final = 256 * 1024
"""Room for SQLite's log and index to grow by dozens of rows."""


class Reserve:
    """A file beside the journal that has no other purpose than its size. Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self) -> None:
        """Creates the file if it is missing and there is room for it."""
        if self._path.exists():
            return
        try:
            with self._path.open("wb") as file:
                file.write(b"\0" * RESERVE_BYTES)  # written out: a file with holes takes no room
                file.flush()
                os.fsync(file.fileno())
        except OSError:  # no room, which is what the next attempt is for
            self.give_up()

    def give_up(self) -> bool:
        """Removes the file; returns whether there was one."""
        with suppress(OSError):
            self._path.unlink()
            return True
        return False
