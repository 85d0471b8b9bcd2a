"""The journal's database: one SQLite file in WAL mode with synchronous=FULL."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from tolaria import __version__
from tolaria.errors import JournalDamagedError, JournalNewerError, JournalUnavailableError
from tolaria.filesystem import Filesystem
from tolaria.journal.reserve import Reserve
from tolaria.journal.rows import (
    SCHEMA_VERSION,
    AdminActionRow,
    AdminCallRow,
    CheckpointRow,
    Incident,
    Row,
    Scalar,
    VersionRow,
    columns,
    row_types,
    schema,
    stored_values,
    values_digest,
)
from tolaria.values.lineage import Lineage

if TYPE_CHECKING:
    from typing import Self

AnyRow = TypeVar("AnyRow", bound=Row)

SIDE_FILES: Final = ("", "-wal", "-shm")
"""Suffixes of the names of the files that SQLite keeps for a database."""

ADMIN_CALLS_MAX: Final = 100_000
"""Calls of operators that are kept, some 50 MB; older ones are removed now and then."""

_CALLS_BETWEEN: Final = 1000
_OLD_CALLS: Final = """
    DELETE FROM admin_calls WHERE rowid IN (SELECT rowid FROM admin_calls ORDER BY rowid DESC LIMIT -1 OFFSET ?)
"""

_SYSTEM_ERRORS: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
    }
)
"""Errors of the operating system. Any other SQLite error about a file that this module wrote means damage."""


class Journal:
    """An open journal; a context manager, safe for use from any thread.

    Opening creates a missing file, and verifies everything: SQLite's integrity check, the schema, each row's digest.

    Raises:
        JournalDamagedError: the file differs from what was written; nothing has changed.
        JournalNewerError: a newer Tolaria wrote it.
        JournalUnavailableError: the file cannot be opened, read or written, or has an older schema: see
            `tolaria.journal.migration`.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._path = path
        self._calls_until_removal = 0
        if not path.exists():
            _create(path)
        with translated_errors(), ExitStack() as on_error:
            self._connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
            on_error.callback(self._connection.close)
            self._connection.text_factory = lenient_text
            self._prepare(path)
            on_error.pop_all()
        self.reserve = Reserve(path.with_name(f"{path.name}.reserve"))
        """Given up for an emergency when the disk is full."""
        self.reserve.keep()

    def put(self, row: Row) -> None:
        """Adds a row, or replaces the one with its key; the first answer to a request stays. Durable on return.

        Of calls of operators the newest `ADMIN_CALLS_MAX` stay.

        Raises:
            JournalUnavailableError: writing failed; the journal is unchanged.
        """
        with self._lock, translated_errors():
            self._require_file()
            insert_row(self._connection, row)
            if isinstance(row, AdminCallRow):
                self._remove_old_calls()

    def answer_once(self, row: AdminActionRow) -> AdminActionRow:
        """Records an operator's request with its response, and returns the first row recorded for this request."""
        self.put(row)
        (first,) = self._select(AdminActionRow, "WHERE request_id = ?", (row.request_id,))
        return first

    def find(self, kind: type[AnyRow], key: str) -> AnyRow | None:
        """Returns the row with this key."""
        found = self._select(kind, f"WHERE {columns(kind)[0]} = ?", (key,))
        return found[0] if found else None

    def rows(self, kind: type[AnyRow], *, run_id: str | None = None) -> tuple[AnyRow, ...]:
        """Returns a table's rows, oldest first, of one run or of all."""
        clause, values = ("", ()) if run_id is None else ("WHERE run_id = ?", (run_id,))
        return self._select(kind, f"{clause} ORDER BY at_ns, rowid", values)

    def checkpoints(self) -> tuple[CheckpointRow, ...]:
        """Returns all runs' checkpoints, oldest first, without the pruned ones, which soon outnumber the others."""
        return self._select(CheckpointRow, "WHERE state != 'pruned' ORDER BY at_ns, rowid", ())

    def restore_points(self, run_id: str) -> tuple[CheckpointRow, ...]:
        """Returns a run's committed checkpoints, oldest first."""
        clause = "WHERE state = 'committed' AND run_id = ? ORDER BY at_ns, rowid"
        return self._select(CheckpointRow, clause, (run_id,))

    def kept_points(self, run_id: str) -> tuple[CheckpointRow, ...]:
        """Returns a run's checkpoints that can be restored, oldest first: committed and superseded ones."""
        clause = "WHERE state IN ('committed', 'superseded') AND run_id = ? ORDER BY at_ns, rowid"
        return self._select(CheckpointRow, clause, (run_id,))

    def revise(self, checkpoint_id: str, **changes: Scalar) -> None:
        """Changes columns of a checkpoint's row, if it exists; other writers' changes to other columns stay."""
        with self._transaction():
            for row in select_rows(self._connection, CheckpointRow, "WHERE checkpoint_id = ?", (checkpoint_id,)):
                insert_row(self._connection, replace(row, **changes))  # type: ignore[arg-type] # columns of the row

    def follow(self, run_id: str, lineage: Lineage, detail: str, at_ns: int) -> int:
        """Makes a run's checkpoints committed if they are ancestors in `lineage`, else superseded; all or none.

        Returns:
            The number of checkpoints that were not superseded before.
        """
        clause, count = "WHERE state IN ('committed', 'superseded') AND run_id = ?", 0
        with self._transaction():
            for row in select_rows(self._connection, CheckpointRow, clause, (run_id,)):
                ancestor = lineage.includes(row.attempt, row.global_step)
                if ancestor and row.state == "superseded":
                    revised = replace(row, state="committed", detail="", superseded_at_ns=None)
                elif not ancestor and row.state == "committed":
                    revised, count = replace(row, state="superseded", detail=detail, superseded_at_ns=at_ns), count + 1
                else:
                    continue
                insert_row(self._connection, revised)
        return count

    def admin_calls(self, limit: int) -> tuple[AdminCallRow, ...]:
        """Returns at most `limit` calls of operators, of all runs, newest first."""
        return self._select(AdminCallRow, "ORDER BY at_ns DESC, rowid DESC LIMIT ?", (limit,))

    def incidents(self, limit: int) -> tuple[Incident, ...]:
        """Returns at most `limit` incidents, newest first."""
        with self._lock, translated_errors():
            query = f"SELECT {', '.join(columns(Incident))} FROM incidents ORDER BY at_ns DESC LIMIT ?"  # noqa: S608 - as below
            found = self._connection.execute(query, (limit,)).fetchall()
        return tuple(
            Incident(incident_id, kind, at_ns, global_step, reason, json.loads(details))
            for incident_id, kind, at_ns, global_step, reason, details in found
        )

    def close(self) -> None:
        """Moves the log's content into the main file and closes it."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _select(self, kind: type[AnyRow], clause: str, values: tuple[Scalar, ...]) -> tuple[AnyRow, ...]:
        with self._lock, translated_errors():
            return tuple(select_rows(self._connection, kind, clause, values))

    def _remove_old_calls(self) -> None:
        self._calls_until_removal -= 1
        if self._calls_until_removal < 0:
            self._calls_until_removal = _CALLS_BETWEEN
            self._connection.execute(_OLD_CALLS, (ADMIN_CALLS_MAX,))

    def _require_file(self) -> None:
        if not self._path.exists():  # SQLite would silently keep writing to the removed file
            raise JournalUnavailableError(f"{self._path} has been removed while it was in use: restart the service")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, translated_errors():
            self._require_file()
            with transaction(self._connection):
                yield

    def _prepare(self, path: Path) -> None:
        refuse_newer(self._connection, path)
        (mode,) = self._connection.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise JournalDamagedError(f"{path}: its journal mode cannot be set, it is {mode}")
        self._connection.execute("PRAGMA synchronous=FULL")
        version = check_content(self._connection, path)
        if version < SCHEMA_VERSION:
            raise JournalUnavailableError(
                f"{path} has schema {version} and has to be upgraded to {SCHEMA_VERSION} first"
            )
        if last_writer(self._connection) != __version__:
            with transaction(self._connection):
                record_version(self._connection, version)
        # A write that changes nothing: a header that forbids writing is found now rather than at the first commit.
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("UPDATE meta SET schema_version = schema_version")
        self._connection.execute("COMMIT")


def check_content(connection: sqlite3.Connection, path: Path) -> int:
    """Verifies version, tables, SQLite's integrity check and each row's digest. Writes nothing.

    Raises:
        JournalDamagedError: the content differs from what was written.
        JournalNewerError: a newer Tolaria wrote the journal.
        sqlite3.DatabaseError: for both, and for errors of the operating system; see `translated_errors`.
    """
    version = refuse_newer(connection, path)
    found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    if {sql for (sql,) in found} != set(schema(version)):
        raise JournalDamagedError(f"{path}: its tables are not those of the schema")
    verdicts = connection.execute("PRAGMA integrity_check").fetchall()
    if verdicts != [("ok",)]:
        raise JournalDamagedError(f"{path}: {verdicts[0][0]}")
    for kind in row_types(version):
        select_rows(connection, kind, "", (), version=version)
    return version


def select_rows(
    connection: sqlite3.Connection,
    kind: type[AnyRow],
    clause: str,
    values: tuple[Scalar, ...],
    *,
    version: int = SCHEMA_VERSION,
) -> list[AnyRow]:
    """Returns the rows of a table that `clause` selects, each verified by its digest. `version` is the schema's.

    Raises:
        JournalDamagedError: a row differs from what was written.
        sqlite3.DatabaseError: as in `check_content`.
    """
    names = ", ".join(columns(kind, version))
    query = f"SELECT {names}, row_digest FROM {kind.table} {clause}"  # noqa: S608 - names of this package only
    rows = []
    for *found, digest in connection.execute(query, values):
        if values_digest(kind.table, tuple(found)) != digest:
            raise JournalDamagedError(f"a row of {kind.table} differs from what was written")
        rows.append(kind(*found))
    return rows


def insert_row(connection: sqlite3.Connection, row: Row, *, version: int = SCHEMA_VERSION) -> None:
    """Adds a row, or replaces the one with its key; the first answer to a request stays. `version` is the schema's."""
    verb = "INSERT OR IGNORE" if isinstance(row, AdminActionRow) else "INSERT OR REPLACE"
    names = (*columns(type(row), version), "row_digest")
    statement = f"{verb} INTO {row.table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
    connection.execute(statement, stored_values(row, version))


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commits what the block writes, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def lenient_text(content: bytes) -> str:
    """Decodes damaged text too, so that the row's digest detects it instead of SQLite's driver raising."""
    return content.decode("utf-8", "surrogateescape")


@contextmanager
def translated_errors(*, read_only: bool = False) -> Iterator[None]:
    """Translates SQLite's errors into `JournalUnavailableError` and `JournalDamagedError`.

    SQLITE_READONLY does not mean damage to a reader: SQLite also reports a log that its writer has not set up yet.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = vars(error).get("sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in _SYSTEM_ERRORS or (read_only and code == sqlite3.SQLITE_READONLY):
            raise JournalUnavailableError(f"the journal cannot be used: {error}") from error
        raise JournalDamagedError(f"the journal is damaged: {error}") from error
    except (UnicodeError, OverflowError, MemoryError) as error:
        raise JournalDamagedError(f"the journal is damaged: {error}") from error


def write_schema(connection: sqlite3.Connection, version: int = SCHEMA_VERSION) -> None:
    """Creates the tables of a schema version in an empty database."""
    for statement in schema(version):
        connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES (?, ?)", (version, values_digest("meta", (version,))))


def refuse_newer(connection: sqlite3.Connection, path: Path) -> int:
    """Returns the journal's schema version. Raises JournalNewerError for a later one than is supported.

    Versions of Tolaria that refuse a journal read these two tables of it: `meta` and, if there is one, `versions`.
    """
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE sql IS NOT NULL LIMIT 1").fetchall():
        raise JournalDamagedError(f"{path}: the file is empty")
    found = connection.execute("SELECT schema_version, row_digest FROM meta").fetchall()
    if len(found) != 1 or values_digest("meta", found[0][:1]) != found[0][1]:
        raise JournalDamagedError(f"{path}: its version cannot be read")
    if found[0][0] > SCHEMA_VERSION:
        raise JournalNewerError(path.parent, found[0][0], SCHEMA_VERSION, last_writer(connection))
    if found[0][0] < 1:
        raise JournalDamagedError(f"{path}: there is no schema {found[0][0]}")
    return int(found[0][0])


def last_writer(connection: sqlite3.Connection) -> str:
    """Returns the version of Tolaria that has opened the journal last, also one of a later schema; empty if unknown."""
    try:
        found = connection.execute("SELECT tolaria FROM versions ORDER BY rowid DESC LIMIT 1").fetchone()
    except sqlite3.Error:
        return ""
    return str(found[0]) if found else ""


def record_version(connection: sqlite3.Connection, schema_from: int, *, backup: str = "") -> None:
    """Adds a row for this version of Tolaria, which has created the journal (0) or opened it with a schema."""
    row = VersionRow(uuid.uuid4().hex, time.time_ns(), __version__, schema_from, SCHEMA_VERSION, backup)
    insert_row(connection, row)


def remove_database(path: Path) -> None:
    """Removes a database with the files that SQLite keeps for it, and those of a process that was killed."""
    for ending in (*SIDE_FILES, "-journal"):
        path.with_name(path.name + ending).unlink(missing_ok=True)


def _create(path: Path) -> None:
    """Creates a journal under another name and renames it, so that a crash leaves none that looks damaged."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        remove_database(temporary)
        with translated_errors(), closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous=FULL")
            with transaction(connection):
                write_schema(connection)
                record_version(connection, 0)
        temporary.rename(path)
        Filesystem().sync_directory(path.parent)
    except OSError as error:
        raise JournalUnavailableError(f"the journal cannot be created: {error}") from error
