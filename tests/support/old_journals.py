"""Journals of older schemas, as the versions before wrote them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from tolaria.journal.rows import (
    AdminActionRow,
    AdminCallRow,
    CheckpointRow,
    CommandRow,
    EmergencyRow,
    FaultRow,
    RollbackRow,
    Row,
    RunRow,
    columns,
    row_types,
    schema,
    stored_values,
    values_digest,
)

ROWS: list[Row] = [
    RunRow("run", 1, "digits", None),
    CheckpointRow("c1", 2, "run", 10, 1, 100, "aa", None),
    CheckpointRow("c2", 3, "run", 20, 1, 100, "bb", 1),
    CommandRow("k", 4, "run", "SEED", 11, "applied", ""),
    RollbackRow("r", 5, "run", "FAST", 30, 20, "restored", "loss", "aa", "aa", 12, 1),
    EmergencyRow("e", 6, "run", "HALT", "judge", 31, "streak"),
    AdminActionRow("q", 7, "run", "PauseTraining", "why", 32, b"\x00\xff"),
    FaultRow("f", 8, "run", "checkpoint_failed", 33, "write", "ENOSPC"),
    AdminCallRow("a", 9, "run", "PauseTraining", "q", "alice", "operator", "192.0.2.1:5", "why", 32, "OK"),
]


def write_as_schema(version: int, path: Path) -> list[Row]:
    """Writes the rows of `ROWS` that a journal of an older schema can have; returns them."""
    rows = [row for row in ROWS if type(row) in row_types(version)]
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        for statement in schema(version):
            connection.execute(statement)
        connection.execute("INSERT INTO meta VALUES (?, ?)", (version, values_digest("meta", (version,))))
        for row in rows:
            names = columns(type(row), version)
            values = stored_values(row)[: len(names)]
            marks = ", ".join("?" * (len(names) + 1))
            statement = f"INSERT INTO {row.table} VALUES ({marks})"  # noqa: S608 - names of the journal
            connection.execute(statement, (*values, values_digest(row.table, values)))
    return rows
