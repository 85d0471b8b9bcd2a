"""Reading a journal without touching it: no file is made, repaired, locked against writing or changed by a byte.

Owns how SQLite is kept from writing. Must not know what the rows are read for.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import quote

from tolaria.errors import JournalDamagedError, JournalError, JournalUnavailableError
from tolaria.rollback.journal import SIDE_FILES, check_content, lenient_text, select_rows, translated

if TYPE_CHECKING:
    from tolaria.rollback.journal_rows import Row

AnyRow = TypeVar("AnyRow", bound="Row")

_TRIES: Final = 8
_TRY_AGAIN_S: Final = 0.01
_WRITE_VERSION_AT: Final = 18
_WRITE_VERSION_MAX: Final = b"\x02"


def read_journal(path: Path, kind: type[AnyRow]) -> tuple[AnyRow, ...]:
    """All rows of a table, oldest first, out of a journal that has been proved whole; a service may be writing it.

    Raises:
        JournalDamagedError: the journal is not what was written.
        JournalNewerError: a newer Tolaria wrote it.
        JournalUnavailableError: it is not there, or the system refused.
    """
    for tries_left in reversed(range(_TRIES)):
        before = _state(path)
        try:
            return _rows(path, kind)
        except JournalError:
            # A service that starts or ends meanwhile changes how the journal is to be read.
            if not tries_left or _state(path) == before:
                raise
        time.sleep(_TRY_AGAIN_S)
    raise AssertionError("the last try returns or raises")


def _rows(path: Path, kind: type[AnyRow]) -> tuple[AnyRow, ...]:
    if not path.exists():
        raise JournalUnavailableError(f"{path}: there is no journal")
    _refuse_other_write_version(path)
    with _untouched(path) as uri, translated(), _refusals(), closing(_connected(uri)) as connection:
        connection.execute("BEGIN")  # one moment of the journal, however much is written meanwhile
        check_content(connection, path)
        return tuple(select_rows(connection, kind, "ORDER BY at_ns, rowid", ()))


def _refuse_other_write_version(path: Path) -> None:
    """The one byte of the header that SQLite minds only when it writes."""
    try:
        with path.open("rb") as file:
            version = file.read(_WRITE_VERSION_AT + 1)[_WRITE_VERSION_AT:]
    except OSError as error:
        raise JournalUnavailableError(f"{path} cannot be read: {error}") from error
    if version > _WRITE_VERSION_MAX:
        raise JournalDamagedError(f"{path}: its header has write version {version.hex()}")


@contextmanager
def _refusals() -> Iterator[None]:
    """That SQLite may not write is no damage here: a log that its writer has not made ready yet is told so too."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_READONLY:
            raise JournalUnavailableError(f"the journal cannot be read without writing: {error}") from error
        raise


@contextmanager
def _untouched(path: Path) -> Iterator[str]:
    """How SQLite is to open the journal so that it neither writes to it nor makes files beside it."""
    log, shared = (path.with_name(path.name + ending) for ending in ("-wal", "-shm"))
    if shared.exists() and log.exists():  # a service has it open, or was killed
        # Should it close the journal before SQLite opens the log here, an empty log is made: the one trace possible.
        yield f"file:{quote(str(path.absolute()))}?mode=ro&readonly_shm=1"
    elif not log.exists():
        yield f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
    else:  # a copy made without the third file, which SQLite would have to make
        with _copied(path) as copy:
            yield f"file:{quote(str(copy))}"


@contextmanager
def _copied(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tolaria-") as folder:
        copy = Path(folder) / path.name
        try:
            for ending in ("", "-wal"):
                shutil.copyfile(path.with_name(path.name + ending), copy.with_name(copy.name + ending))
        except OSError as error:
            raise JournalUnavailableError(f"{path} cannot be read: {error}") from error
        yield copy


def _connected(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, timeout=5.0, isolation_level=None)
    connection.text_factory = lenient_text
    return connection


def _state(path: Path) -> list[tuple[str, int, int]]:
    """Differs once somebody has opened, closed or written the journal."""
    found = []
    for ending in SIDE_FILES:
        with contextlib.suppress(FileNotFoundError):
            status = path.with_name(path.name + ending).stat()
            found.append((ending, status.st_mtime_ns, status.st_size))
    return found
