"""Values that are read from files, and read again without a restart when a file has changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

import anyio
import anyio.to_thread
import structlog

from tolaria.errors import CredentialsError

RELOAD_S: Final = 2.0
"""Seconds between two looks at the files. A revoked token may be used for that long."""

_Value = TypeVar("_Value")
_Stamp = tuple[int, int, int]


class WatchedFiles(Generic[_Value]):
    """The value that `read` makes of some files, and that of their latest sound version.

    A version that cannot be used is logged once and leaves the value as it is: a file that is half written does not
    lock operators out. Attributes may be read from any thread.

    Args:
        what: the files, for the log.
        read: returns the value and the files that it comes from.
        on_failure: called for each new version that cannot be used.

    Attributes:
        problem: why the newest version cannot be used; empty if it is in use.

    Raises:
        CredentialsError: the first version cannot be used.
    """

    def __init__(
        self,
        what: str,
        read: Callable[[], tuple[_Value, Sequence[str]]],
        *,
        on_failure: Callable[[], object] = lambda: None,
    ) -> None:
        self._what = what
        self._read = read
        self._log = structlog.get_logger(__name__)
        self.problem = ""
        self._on_failure = on_failure
        self.value, self._files = read()
        self._stamps = self._look()

    def refresh(self) -> bool:
        """Reads the files again if one of them has changed, or could not be used; returns whether the value is new."""
        stamps = self._look()
        if stamps == self._stamps and not self.problem:
            return False
        try:
            self.value, self._files = self._read()
        except CredentialsError as error:
            if str(error) != self.problem:
                self._on_failure()
                self._log.error("credentials_not_reloaded", what=self._what, detail=str(error), kept="the last ones")
            self.problem = str(error)
            return False
        self._stamps, self.problem = stamps, ""  # of before the reading: a change meanwhile is seen next time
        self._log.info("credentials_reloaded", what=self._what, files=list(self._files))
        return True

    def _look(self) -> list[_Stamp | None]:
        return [_stamp(path) for path in self._files]


async def watch(*watched: WatchedFiles[Any]) -> None:
    """Keeps the values current until cancelled. A disk that hangs leaves them as they are."""
    one_thread = anyio.CapacityLimiter(1)
    while watched:
        await anyio.sleep(RELOAD_S)
        for files in watched:
            await anyio.to_thread.run_sync(files.refresh, abandon_on_cancel=True, limiter=one_thread)


def read_file(path: str, setting: str) -> bytes:
    """Returns the content of a file. Raises CredentialsError, which names the setting."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - the path is a text in every setting
            return file.read(_BYTES_MAX)
    except OSError as error:
        raise CredentialsError(setting, path, error.strerror or str(error)) from None


_BYTES_MAX: Final = 1024 * 1024


def _stamp(path: str) -> _Stamp | None:
    """Returns what changes with a file's content; follows links, which mounted secrets are."""
    try:
        found = os.stat(path)  # noqa: PTH116 - as above
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
