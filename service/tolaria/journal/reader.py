"""Read-only access to a journal: no file is created, repaired, changed or locked against writing."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from tolaria.errors import JournalDamagedError, JournalError, JournalUnavailableError
from tolaria.journal.database import (
    SIDE_FILES,
    AnyRow,
    check_content,
    lenient_text,
    refuse_newer,
    remove_database,
    select_rows,
    translated_errors,
)
from tolaria.journal.rows import row_types

_Found = TypeVar("_Found")

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

    def rows(connection: sqlite3.Connection) -> tuple[AnyRow, ...]:
        version = check_content(connection, path)
        if kind not in row_types(version):
            return ()  # of an older schema, which has no such rows
        return tuple(select_rows(connection, kind, "ORDER BY at_ns, rowid", (), version=version))

    return _read(path, rows)


def copy_journal(path: Path, target: Path, *, on_state: Callable[[sqlite3.Connection], None] | None = None) -> None:
    """Writes a copy of one consistent state of the journal to the new file `target`, by SQLite's backup API.

    A service may write meanwhile. The copy is one file without a log; it is verified, and flushed to the disk. Before
    anything is copied, `on_state` is called with a connection that sees the state that will be; once more if the copy
    has to begin again, as when a service starts meanwhile.

    Raises:
        OSError: `target` cannot be written.
        JournalError: as `read_journal`; also if there is no room for the copy.
    """

    def copy(connection: sqlite3.Connection) -> None:
        if on_state is not None:  # the first read chooses the state
            on_state(connection)
        check_content(connection, path)
        remove_database(target)
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with closing(sqlite3.connect(target, isolation_level=None)) as written:
            connection.backup(written)
            written.execute("PRAGMA journal_mode=DELETE")
            check_content(written, target)

    def copy_as_it_is(connection: sqlite3.Connection) -> None:
        # Without a log SQLite trusts that nothing writes: a service that starts meanwhile would tear the copy.
        before = _file_states(path)
        copy(connection)
        if not any(ending for ending, *_ in before) and _file_states(path) != before:
            raise JournalUnavailableError(f"{path} has been opened by a service while it was copied")

    try:
        _read(path, copy_as_it_is)
        descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        with suppress(OSError):
            remove_database(target)
        raise


def schema_of(path: Path) -> int:
    """Returns the schema version of a journal, which is not verified otherwise. Raises as `read_journal`."""
    return _read(path, lambda connection: refuse_newer(connection, path))


def connect_read_only(uri: str) -> sqlite3.Connection:
    """Opens a database by URI, whose parameters keep SQLite from writing."""
    connection = sqlite3.connect(uri, uri=True, timeout=5.0, isolation_level=None)
    connection.text_factory = lenient_text
    return connection


def _read(path: Path, read: Callable[[sqlite3.Connection], _Found]) -> _Found:
    """Returns what `read` returns for a connection, once more when a service starts or ends meanwhile."""
    for _ in range(_TRIES - 1):
        before = _file_states(path)
        try:
            return _read_once(path, read)
        except JournalError as error:
            # A service that starts or ends meanwhile changes how the journal must be opened.
            if _file_states(path) == before:
                if isinstance(error, JournalUnavailableError):
                    return _read_copy(path, read, error)
                raise
        time.sleep(_RETRY_S)
    return _read_once(path, read)


def _read_copy(path: Path, read: Callable[[sqlite3.Connection], _Found], error: JournalUnavailableError) -> _Found:
    """Reads a copy, in which SQLite can set up the log that a killed process has left half set up."""
    before = _file_states(path)
    if not any(ending for ending, *_ in before):
        raise error
    with (
        _copied(path) as copy,
        translated_errors(read_only=True),
        closing(connect_read_only(f"file:{quote(str(copy))}")) as connection,
    ):
        if _file_states(path) != before:
            raise error
        connection.execute("BEGIN")
        return read(connection)


def _read_once(path: Path, read: Callable[[sqlite3.Connection], _Found]) -> _Found:
    if not path.exists():
        raise JournalUnavailableError(f"{path}: there is no journal")
    _refuse_other_write_version(path)
    with (
        _read_only_uri(path) as uri,
        translated_errors(read_only=True),
        closing(connect_read_only(uri)) as connection,
    ):
        connection.execute("BEGIN")  # one consistent state of the journal, whatever is written meanwhile
        return read(connection)


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
                part = path.with_name(path.name + ending)
                if not ending or part.exists():
                    shutil.copyfile(part, copy.with_name(copy.name + ending))
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
