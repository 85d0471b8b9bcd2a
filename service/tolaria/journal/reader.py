"""Read-only access to a journal: no file is created, repaired, changed or locked against writing."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote

from tolaria.errors import JournalDamagedError, JournalError, JournalUnavailableError
from tolaria.journal.database import SIDE_FILES, AnyRow, check_content, lenient_text, select_rows, translated_errors
from tolaria.journal.rows import row_types

_TRIES: Final = 8
_RETRY_S: Final = 0.01
_WRITE_VERSION_AT: Final = 18
_WRITE_VERSION_MAX: Final = b"\x02"


def read_journal(path: Path, kind: type[AnyRow]) -> tuple[AnyRow, ...]:
    """Verifies the whole journal and returns a table's rows, oldest first. A service may write meanwhile.

    Raises:
        JournalDamagedError: the journal differs from what was written.
        JournalNewerError: a newer Tolaria wrote it.
        JournalUnavailableError: it does not exist or cannot be read.
    """
    for _ in range(_TRIES - 1):
        before = _file_states(path)
        try:
            return _rows(path, kind)
        except JournalError:
            # A service that starts or ends meanwhile changes how the journal must be opened.
            if _file_states(path) == before:
                raise
        time.sleep(_RETRY_S)
    return _rows(path, kind)


def connect_read_only(uri: str) -> sqlite3.Connection:
    """Opens a database by URI, whose parameters keep SQLite from writing."""
    connection = sqlite3.connect(uri, uri=True, timeout=5.0, isolation_level=None)
    connection.text_factory = lenient_text
    return connection


def _rows(path: Path, kind: type[AnyRow]) -> tuple[AnyRow, ...]:
    if not path.exists():
        raise JournalUnavailableError(f"{path}: there is no journal")
    _refuse_other_write_version(path)
    with (
        _read_only_uri(path) as uri,
        translated_errors(read_only=True),
        closing(connect_read_only(uri)) as connection,
    ):
        connection.execute("BEGIN")  # one consistent state of the journal, whatever is written meanwhile
        version = check_content(connection, path)
        if kind not in row_types(version):
            return ()  # of an older schema, which has no such rows
        return tuple(select_rows(connection, kind, "ORDER BY at_ns, rowid", (), version=version))


def _refuse_other_write_version(path: Path) -> None:
    """Checks the one byte of the header that SQLite checks only when it writes."""
    try:
        with path.open("rb") as file:
            version = file.read(_WRITE_VERSION_AT + 1)[_WRITE_VERSION_AT:]
    except OSError as error:
        raise JournalUnavailableError(f"{path} cannot be read: {error}") from error
    if version > _WRITE_VERSION_MAX:
        raise JournalDamagedError(f"{path}: its header has write version {version.hex()}")


@contextmanager
def _read_only_uri(path: Path) -> Iterator[str]:
    """Yields a URI with which SQLite neither writes to the journal nor creates files beside it."""
    log, shared = (path.with_name(path.name + ending) for ending in ("-wal", "-shm"))
    if shared.exists() and log.exists():  # a service has it open, or was killed
        # If the service closes the journal before SQLite opens the log, SQLite leaves an empty log behind.
        yield f"file:{quote(str(path.absolute()))}?mode=ro&readonly_shm=1"
    elif not log.exists():
        yield f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
    else:  # the journal was copied without its -shm file, which SQLite would have to create
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


def _file_states(path: Path) -> list[tuple[str, int, int]]:
    """Returns a value that changes when the journal is opened, closed or written."""
    found = []
    for ending in SIDE_FILES:
        with suppress(FileNotFoundError):
            status = path.with_name(path.name + ending).stat()
            found.append((ending, status.st_mtime_ns, status.st_size))
    return found
