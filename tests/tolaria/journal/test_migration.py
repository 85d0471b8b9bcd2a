from __future__ import annotations

import json
import sqlite3
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from support.old_journals import ROWS, write_as_schema
from tolaria import __version__
from tolaria.errors import JournalDamagedError, JournalUnavailableError, StateRefusedError
from tolaria.journal.database import Journal, check_content
from tolaria.journal.migration import OpenJournal
from tolaria.journal.reader import copy_journal, read_journal, schema_of
from tolaria.journal.rows import (
    ROW_TYPES,
    SCHEMA_VERSION,
    AdminCallRow,
    CheckpointRow,
    CommandRow,
    Row,
    VersionRow,
    columns,
    row_types,
)

OLDER = range(1, SCHEMA_VERSION)


def all_rows(path: Path) -> list[Row]:
    """All rows but those of versions, by table."""
    return [row for kind in ROW_TYPES if kind is not VersionRow for row in read_journal(path, kind)]


def by_table(rows: list[Row]) -> list[Row]:
    """In the order of `all_rows`."""
    return [row for kind in ROW_TYPES for row in rows if type(row) is kind]


@pytest.mark.parametrize("version", OLDER)
def test_a_journal_of_an_older_schema_is_upgraded(version: int, tmp_path: Path) -> None:
    """It is read without being changed, and opened only after the upgrade; new columns have defaults."""
    path = tmp_path / "j"
    rows = write_as_schema(version, path)
    before = path.read_bytes()
    assert read_journal(path, CheckpointRow) == tuple(row for row in rows if isinstance(row, CheckpointRow))
    assert read_journal(path, VersionRow) == ()
    assert schema_of(path) == version
    with pytest.raises(JournalUnavailableError, match=f"has schema {version} and has to be upgraded"):
        Journal(path)
    assert path.read_bytes() == before
    with OpenJournal(path) as opened:
        assert opened.schema == version
        opened.upgrade("backups/x")
    assert all_rows(path) == by_table(rows)
    call = AdminCallRow("later", 19, "run", "StopTraining", "q", "root", "admin", "::1:5", "why", 32)
    with Journal(path) as journal:
        assert journal.incidents(10)[2].details["origin"] == ""
        journal.put(call)
        assert journal.admin_calls(1) == (call,)
        (recorded,) = journal.rows(VersionRow)
    expected = (__version__, version, SCHEMA_VERSION, "backups/x")
    assert (recorded.tolaria, recorded.schema_from, recorded.schema_to, recorded.backup) == expected


@pytest.mark.parametrize("version", OLDER)
def test_a_downgrade_gives_what_the_older_version_wrote(version: int, tmp_path: Path) -> None:
    """An upgrade and a downgrade lead to the same tables and rows; only those of later tables are counted as lost."""
    path, old = tmp_path / "j", tmp_path / "old"
    rows = write_as_schema(version, path)
    write_as_schema(version, old)
    with OpenJournal(path) as opened:
        opened.upgrade("")
        opened.refuse_downgrade(version)
        lost = opened.downgrade(version)
    assert lost == {kind.table: int(kind is VersionRow) for kind in ROW_TYPES if kind not in row_types(version)}
    assert schema_of(path) == version
    assert all_rows(path) == by_table(rows)
    assert content(path) == content(old)


def content(path: Path) -> list[object]:
    """Statements and rows of all tables as SQLite has them."""
    with closing(sqlite3.connect(path)) as connection:
        check_content(connection, path)
        statements = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name").fetchall()
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
        return [statements, *(connection.execute(f"SELECT * FROM {name}").fetchall() for (name,) in tables)]  # noqa: S608 - names of the journal


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"at_ns": 2**62}, "1 of 2 checkpoints were written by versions with a later schema"),
        ({"state": "superseded"}, "no ancestors of checkpoints"),
        ({"attempt": 2}, "no ancestors of checkpoints"),
    ],
)
def test_a_downgrade_that_would_lose_a_run_is_refused(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    """Schema 1 has no lineage, and its versions cannot restore later states. What is pruned is no obstacle."""
    path = tmp_path / "j"
    write_as_schema(1, path)
    with OpenJournal(path) as opened:
        opened.upgrade("")
    row = next(row for row in ROWS if isinstance(row, CheckpointRow))
    with Journal(path) as journal:
        journal.put(replace(row, checkpoint_id="gone", at_ns=2**62, state="pruned"))
    with OpenJournal(path) as opened:
        opened.refuse_downgrade(1)
    with Journal(path) as journal:
        journal.put(replace(row, **changes))  # type: ignore[arg-type] # columns of the row
    with OpenJournal(path) as opened:
        opened.refuse_downgrade(2)
        with pytest.raises(StateRefusedError, match=reason):
            opened.refuse_downgrade(1)


@pytest.mark.parametrize(("removed_at_ns", "refused"), [(None, True), (5, False)])
def test_a_downgrade_does_not_undo_skips_of_data(removed_at_ns: int | None, refused: bool, tmp_path: Path) -> None:
    """An older version would train on what operators have left out."""
    path = tmp_path / "j"
    skips = json.dumps([{"skip_id": "a", "removed_at_ns": removed_at_ns}])
    with Journal(path) as journal:
        journal.put(CommandRow("data_skips@run", 1, "run", "data_skips", 4, "applied", skips))
    with OpenJournal(path) as opened:
        opened.refuse_downgrade(4)
        with pytest.raises(StateRefusedError, match="data that operators have left out") if refused else nullcontext():
            opened.refuse_downgrade(3)


def test_a_journal_that_began_with_a_later_schema_does_not_go_below_it(tmp_path: Path) -> None:
    """All of its checkpoints are of later versions."""
    path = tmp_path / "j"
    write_as_schema(2, path)
    with OpenJournal(path) as opened:
        opened.upgrade("")
        with pytest.raises(StateRefusedError, match="2 of 2 checkpoints"):
            opened.refuse_downgrade(1)


def test_a_damaged_journal_of_an_older_schema_is_not_migrated(tmp_path: Path) -> None:
    """A row that differs from what was written is damage, not content to be carried over."""
    path = tmp_path / "j"
    write_as_schema(1, path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE rollbacks SET latency_ms = 13.0")
        connection.commit()
    with pytest.raises(JournalDamagedError):
        OpenJournal(path)
    assert path.exists()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT schema_version FROM meta").fetchall() == [(1,)]


def test_every_table_and_column_has_a_schema_that_added_it() -> None:
    """Schema 1 is a fixed set: what is added without raising the schema is found here."""
    assert {kind.table: len(columns(kind, 1)) for kind in row_types(1)} == {
        "runs": 7, "checkpoints": 10, "commands": 7, "rollbacks": 12, "emergencies": 8, "admin_actions": 7, "faults": 7
    }  # fmt: skip


def test_a_copy_is_one_state_while_another_connection_writes(tmp_path: Path) -> None:
    """The copy is a single file with all committed rows, and none of an open transaction."""
    path, copy = tmp_path / "j", tmp_path / "copy"
    with Journal(path) as journal:
        for number in range(500):
            journal.put(CommandRow(f"k{number}", number, "run", "SEED", number, "applied", "x" * 200))
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("DELETE FROM commands")
            copy_journal(path, copy)
            other.execute("ROLLBACK")
        assert read_journal(copy, CommandRow) == journal.rows(CommandRow)
    assert sorted(place.name for place in tmp_path.iterdir() if place.name.startswith("copy")) == ["copy"]
    assert copy.stat().st_mode & 0o777 == 0o600
