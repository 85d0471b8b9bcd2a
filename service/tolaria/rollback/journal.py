"""The journal: one SQLite file (WAL, synchronous=FULL) that remembers what happened and what was answered.

Owns the connection and what counts as damage. Safe from any thread; a commit takes about half a millisecond, so not
from the event loop. Must not know where checkpoints are: the store rebuilds a damaged journal from them.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from tolaria.errors import JournalDamagedError, JournalNewerError, JournalUnavailableError
from tolaria.rollback.filesystem import Filesystem
from tolaria.rollback.journal_rows import (
    INCIDENTS_VIEW,
    ROW_TYPES,
    SCHEMA_VERSION,
    AdminActionRow,
    CheckpointRow,
    Incident,
    Row,
    Scalar,
    columns,
    create_table,
    stored_values,
    values_digest,
)

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

AnyRow = TypeVar("AnyRow", bound=Row)

SIDE_FILES: Final = ("", "-wal", "-shm")
"""What SQLite's file consists of beside its name."""

_META: Final = "CREATE TABLE meta (schema_version INTEGER NOT NULL, row_digest TEXT NOT NULL)"

_SYSTEM_ERRORS: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PERM,
    }
)
"""The system's refusals. Whatever else SQLite says of a file that this module wrote is damage."""


class Journal:
    """An open journal; a context manager.

    Opening creates the file if it is not there, and reads everything once: SQLite's own check, schema, rows' digests.

    Raises:
        JournalDamagedError: the file is not what was written; nothing has been changed.
        JournalNewerError: a newer Tolaria wrote it.
        JournalUnavailableError: the system refused.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._path = path
        if not path.exists():
            _create(path)
        with translated():
            self._connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            with translated():
                self._connection.text_factory = lenient_text
                self._prepare(path)
        except BaseException:
            self._connection.close()
            raise

    def put(self, row: Row) -> None:
        """Add a row, or replace the one with its key; durable when this returns.

        Raises:
            JournalUnavailableError: the system refused; the journal is as it was.
        """
        names = (*columns(type(row)), "row_digest")
        marks = ", ".join("?" * len(names))
        statement = f"INSERT OR REPLACE INTO {row.table} ({', '.join(names)}) VALUES ({marks})"  # noqa: S608 - our names
        with self._lock, translated():
            self._demand_file()
            self._connection.execute(statement, stored_values(row))

    def answer_once(self, row: AdminActionRow) -> AdminActionRow:
        """Record an operator's request and its answer, unless that request has one: then the first, which counts."""
        with self._lock, translated():
            self._demand_file()
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                found = select_rows(self._connection, AdminActionRow, "WHERE request_id = ?", (row.request_id,))
                if not found:
                    names = (*columns(AdminActionRow), "row_digest")
                    statement = f"INSERT INTO admin_actions VALUES ({', '.join('?' * len(names))})"  # noqa: S608 - marks
                    self._connection.execute(statement, stored_values(row))
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
            return found[0] if found else row

    def find(self, kind: type[AnyRow], key: str) -> AnyRow | None:
        """The row with this key."""
        with self._lock, translated():
            found = select_rows(self._connection, kind, f"WHERE {columns(kind)[0]} = ?", (key,))
            return found[0] if found else None

    def rows(self, kind: type[AnyRow], *, run_id: str | None = None) -> tuple[AnyRow, ...]:
        """All rows of a table, oldest first; of one run if told."""
        with self._lock, translated():
            clause, values = ("", ()) if run_id is None else ("WHERE run_id = ?", (run_id,))
            return tuple(select_rows(self._connection, kind, f"{clause} ORDER BY at_ns, rowid", values))

    def checkpoints(self, *, run_id: str | None = None) -> tuple[CheckpointRow, ...]:
        """As `rows`, without those that retention has removed: these are by far the most, and only ever more."""
        with self._lock, translated():
            clause, values = ("", ()) if run_id is None else (" AND run_id = ?", (run_id,))
            where = f"WHERE state != 'pruned'{clause} ORDER BY at_ns, rowid"
            return tuple(select_rows(self._connection, CheckpointRow, where, values))

    def incidents(self, limit: int) -> tuple[Incident, ...]:
        """The newest `limit` incidents, newest first."""
        with self._lock, translated():
            found = self._connection.execute(
                "SELECT incident_id, kind, at_ns, global_step, reason, details FROM incidents"
                " ORDER BY at_ns DESC LIMIT ?",
                (limit,),
            ).fetchall()
        return tuple(
            Incident(incident_id, kind, at_ns, global_step, reason, json.loads(details))
            for incident_id, kind, at_ns, global_step, reason, details in found
        )

    def close(self) -> None:
        """Bring everything into the one file and close it."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _demand_file(self) -> None:
        """SQLite writes on, without a word, into a file that somebody has removed."""
        if not self._path.exists():
            raise JournalUnavailableError(f"{self._path} has been removed while it was in use: restart the service")

    def _prepare(self, path: Path) -> None:
        _refuse_newer(self._connection, path)
        (mode,) = self._connection.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise JournalDamagedError(f"{path}: its journal mode cannot be set, it is {mode}")
        self._connection.execute("PRAGMA synchronous=FULL")
        check_content(self._connection, path)
        # A write that changes nothing: a header that forbids writing shows now rather than at the first commit.
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("UPDATE meta SET schema_version = schema_version")
        self._connection.execute("COMMIT")


def check_content(connection: sqlite3.Connection, path: Path) -> None:
    """Read everything once: the version, the tables, SQLite's own check, every row's digest. Nothing is written.

    Raises:
        JournalDamagedError: something is not what was written.
        JournalNewerError: a newer Tolaria wrote it.
        sqlite3.DatabaseError: SQLite's own word for either, or for a refusal of the system; see `translated`.
    """
    _refuse_newer(connection, path)
    schema = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    if {sql for (sql,) in schema} != set(_schema()):
        raise JournalDamagedError(f"{path}: its tables are not those that were made")
    verdicts = connection.execute("PRAGMA integrity_check").fetchall()
    if verdicts != [("ok",)]:
        raise JournalDamagedError(f"{path}: {verdicts[0][0]}")
    for kind in ROW_TYPES:
        select_rows(connection, kind, "", ())


def select_rows(
    connection: sqlite3.Connection, kind: type[AnyRow], clause: str, values: tuple[Scalar, ...]
) -> list[AnyRow]:
    """The rows of a table that `clause` selects, each proved by its digest.

    Raises:
        JournalDamagedError: a row is not what was written.
        sqlite3.DatabaseError: as `check_content` does.
    """
    names = ", ".join(columns(kind))
    query = f"SELECT {names}, row_digest FROM {kind.table} {clause}"  # noqa: S608 - our own names
    rows = []
    for *found, digest in connection.execute(query, values):
        if values_digest(kind.table, tuple(found)) != digest:
            raise JournalDamagedError(f"a row of {kind.table} is not what was written")
        rows.append(kind(*found))
    return rows


def _refuse_newer(connection: sqlite3.Connection, path: Path) -> None:
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE sql IS NOT NULL LIMIT 1").fetchall():
        raise JournalDamagedError(f"{path}: the file is there but empty")
    found = connection.execute("SELECT schema_version, row_digest FROM meta").fetchall()
    if len(found) != 1 or values_digest("meta", found[0][:1]) != found[0][1]:
        raise JournalDamagedError(f"{path}: its version cannot be told")
    if found[0][0] > SCHEMA_VERSION:
        raise JournalNewerError(f"{path} has schema {found[0][0]}; this Tolaria knows {SCHEMA_VERSION}")


def _create(path: Path) -> None:
    """Make an empty journal aside and rename it, so that one cut short by a crash is never taken for a damaged one."""
    aside = path.with_name(f"{path.name}.new")
    try:
        for ending in (*SIDE_FILES, "-journal"):
            aside.with_name(aside.name + ending).unlink(missing_ok=True)
        with translated(), closing(sqlite3.connect(aside, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("BEGIN IMMEDIATE")
            for statement in _schema():
                connection.execute(statement)
            digest = values_digest("meta", (SCHEMA_VERSION,))
            connection.execute("INSERT INTO meta VALUES (?, ?)", (SCHEMA_VERSION, digest))
            connection.execute("COMMIT")
        aside.rename(path)
        Filesystem().sync_directory(path.parent)
    except OSError as error:
        raise JournalUnavailableError(f"the journal cannot be made: {error}") from error


def _schema() -> list[str]:
    return [_META, *(create_table(kind) for kind in ROW_TYPES), INCIDENTS_VIEW]


def lenient_text(content: bytes) -> str:
    """Damaged text shall reach the row's digest rather than stop SQLite's driver."""
    return content.decode("utf-8", "surrogateescape")


@contextmanager
def translated() -> Iterator[None]:
    """The one place where SQLite's errors become ours."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = vars(error).get("sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in _SYSTEM_ERRORS:
            raise JournalUnavailableError(f"the journal cannot be used: {error}") from error
        raise JournalDamagedError(f"the journal is damaged: {error}") from error
    except (UnicodeError, OverflowError, MemoryError) as error:
        raise JournalDamagedError(f"the journal is damaged: {error}") from error
