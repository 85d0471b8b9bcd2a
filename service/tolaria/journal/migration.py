"""Migration of a journal to another schema, in one transaction: forward, and back where the older one can hold it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tolaria.errors import JournalUnavailableError, StateRefusedError
from tolaria.journal.database import (
    AnyRow,
    check_content,
    insert_row,
    lenient_text,
    record_version,
    refuse_newer,
    select_rows,
    transaction,
    translated_errors,
    write_schema,
)
from tolaria.journal.rows import DATA_SKIPS, SCHEMA_VERSION, CheckpointRow, CommandRow, VersionRow, row_types
from tolaria.values.lineage import FIRST_ATTEMPT

if TYPE_CHECKING:
    from typing import Self

OLDEST_SCHEMA: Final = 1

_LINEAGE_SINCE: Final = 2
"""Schema that first recorded the ancestors of checkpoints."""


_SKIPS_SINCE: Final = 4
"""Schema of the first versions that leave out data on request."""


class OpenJournal:
    """A journal of any schema up to the present one, opened for a migration. A context manager.

    The state directory must be locked. Opening verifies the content, and changes nothing.

    Raises:
        JournalDamagedError: the file differs from what was written.
        JournalNewerError: a newer Tolaria wrote it.
        JournalUnavailableError: the file cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.exists():
            raise JournalUnavailableError(f"{path}: there is no journal")
        with translated_errors():
            self._connection = sqlite3.connect(path, timeout=5.0, isolation_level=None)
            self._connection.text_factory = lenient_text
            try:
                refuse_newer(self._connection, path)
                self._connection.execute("PRAGMA journal_mode=WAL")
                self._connection.execute("PRAGMA synchronous=FULL")
                self.schema = check_content(self._connection, path)
            except BaseException:
                self._connection.close()
                raise

    def upgrade(self, backup: str) -> None:
        """Rewrites the journal in the present schema, all or nothing; new columns get their defaults.

        `backup` names the copy that was taken before. Raises JournalUnavailableError: the journal is unchanged.
        """
        with translated_errors(), transaction(self._connection):
            _rewrite(self._connection, self.schema, SCHEMA_VERSION)
            record_version(self._connection, self.schema, backup=backup)
        self.schema = SCHEMA_VERSION

    def refuse_downgrade(self, target: int) -> None:
        """Raises StateRefusedError if the older schema cannot hold what a version that reads it needs."""
        with translated_errors():
            if problems := [*self._obstacles(target)]:
                raise StateRefusedError(f"{self._path.parent} cannot have schema {target}: {'; '.join(problems)}")

    def downgrade(self, target: int) -> dict[str, int]:
        """Rewrites the journal in an older schema, all or nothing; `refuse_downgrade` says whether it can hold it.

        Returns:
            The number of rows of each table that the older schema does not have.

        Raises:
            JournalUnavailableError: the journal is unchanged.
        """
        with translated_errors():
            lost = {}
            for kind in row_types(self.schema):
                if kind not in row_types(target):
                    lost[kind.table] = len(select_rows(self._connection, kind, "", (), version=self.schema))
            with transaction(self._connection):
                _rewrite(self._connection, self.schema, target)
        self.schema = target
        return lost

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._connection.close()

    def _obstacles(self, target: int) -> Iterator[str]:
        """Yields why a version with the older schema could not go on with this state."""
        if target < _SKIPS_SINCE and any(map(_has_skips, self._rows(CommandRow))):
            yield (
                f"versions with schema {target} would train on the data that operators have left out (tolaria skip "
                "--list); undo these skips first, or keep this version"
            )
        if target >= _LINEAGE_SINCE or self.schema < _LINEAGE_SINCE:
            return
        upgrades = [row.at_ns for row in self._rows(VersionRow) if 0 < row.schema_from < _LINEAGE_SINCE]
        kept = [row for row in self._rows(CheckpointRow) if row.state in {"committed", "superseded"}]
        if later := [row for row in kept if row.at_ns > max(upgrades, default=0)]:
            yield (
                f"{len(later)} of {len(kept)} checkpoints were written by versions with a later schema, and versions "
                f"with schema {target} cannot restore their states"
            )
        if [row for row in kept if row.state == "superseded" or row.attempt != FIRST_ATTEMPT]:
            yield (
                f"schema {target} has no ancestors of checkpoints: a version with it could resume from a state that a "
                "rollback has left"
            )

    def _rows(self, kind: type[AnyRow]) -> list[AnyRow]:
        if kind not in row_types(self.schema):
            return []
        return select_rows(self._connection, kind, "ORDER BY rowid", (), version=self.schema)


def _has_skips(row: CommandRow) -> bool:
    """Whether this row has skips of data that hold."""
    if row.kind != DATA_SKIPS:
        return False
    with suppress(ValueError, TypeError, AttributeError):
        return any(skip.get("removed_at_ns") is None for skip in json.loads(row.reason))
    return True


def _rewrite(connection: sqlite3.Connection, version: int, target: int) -> None:
    kinds = row_types(version)
    rows = [row for kind in kinds for row in select_rows(connection, kind, "ORDER BY rowid", (), version=version)]
    connection.execute("DROP VIEW incidents")
    for table in ("meta", *(kind.table for kind in kinds)):
        connection.execute(f"DROP TABLE {table}")
    write_schema(connection, target)
    for row in rows:
        if type(row) in row_types(target):
            insert_row(connection, row, version=target)
