from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tolaria.errors import JournalDamagedError, JournalNewerError, JournalUnavailableError
from tolaria.journal import database
from tolaria.journal.database import Journal
from tolaria.journal.rows import (
    ROW_TYPES,
    SCHEMA_VERSION,
    AdminActionRow,
    AdminCallRow,
    CheckpointRow,
    CommandRow,
    EmergencyRow,
    FaultRow,
    RollbackRow,
    Row,
    RunRow,
    VersionRow,
    values_digest,
)
from tolaria.values.lineage import Lineage

ROWS: list[Row] = [
    RunRow("run", 1, "digits", None),
    CheckpointRow("c1", 2, "run", 10, 1, 100, "aa", None),
    CheckpointRow("c2", 3, "run", 20, 1, 100, "bb", 1),
    CommandRow("k", 4, "run", "SEED", 11, "applied", ""),
    RollbackRow("r", 5, "run", "FAST", 30, 20, "restored", "loss", "aa", "aa", 12, 1),
    EmergencyRow("e", 6, "run", "HALT", "judge", 31, "stréak \udc80"),
    AdminActionRow("q", 7, "run", "PauseTraining", "why", 32, b"\x00\xff"),
    FaultRow("f", 8, "run", "checkpoint_failed", 33, "write", "ENOSPC"),
    AdminCallRow("a", 9, "run", "PauseTraining", "q", "alice", "operator", "192.0.2.1:5", "why", 32, "OK"),
]


def filled(path: Path) -> Path:
    """A closed journal with one row of each kind."""
    with Journal(path) as journal:
        for row in ROWS:
            journal.put(row)
    return path


def test_rows_survive_reopening(tmp_path: Path) -> None:
    """Every kind of row is read back, ordered by time."""
    with Journal(filled(tmp_path / "j")) as journal:
        found = [row for kind in ROW_TYPES for row in journal.rows(kind) if kind is not VersionRow]
        assert [r for r in found if not isinstance(r, EmergencyRow)] == [
            r for r in ROWS if not isinstance(r, EmergencyRow)
        ]
        assert {type(row) for row in found} == set(ROW_TYPES) - {VersionRow}
        assert journal.find(RunRow, "run") == ROWS[0]
        assert journal.find(RunRow, "other") is None
        assert journal.rows(CheckpointRow, run_id="other") == ()


def test_incidents_are_rollbacks_emergencies_and_faults_newest_first(tmp_path: Path) -> None:
    """The view joins the three tables, and the limit applies."""
    with Journal(filled(tmp_path / "j")) as journal:
        assert [i.kind for i in journal.incidents(10)] == ["checkpoint_failed", "emergency", "rollback"]
        rollback = journal.incidents(10)[2]
        assert (rollback.reason, rollback.details["tier"], rollback.details["restored_step"]) == ("loss", "FAST", "20")
        assert len(journal.incidents(1)) == 1


def test_the_first_answer_to_a_request_counts(tmp_path: Path) -> None:
    """A repeated request gets the first answer, also after a restart."""
    first = AdminActionRow("q", 1, "run", "Pause", "", 5, b"first")
    with Journal(tmp_path / "j") as journal:
        assert journal.answer_once(first) == first
    with Journal(tmp_path / "j") as journal:
        assert journal.answer_once(AdminActionRow("q", 2, "run", "Pause", "", 9, b"second")) == first


def test_numbers_must_be_finite(tmp_path: Path) -> None:
    """SQLite would store NaN as NULL, so it is refused."""
    with Journal(tmp_path / "j") as journal, pytest.raises(ValueError, match="metric"):
        journal.put(CheckpointRow("c", 1, "r", 1, 1, 1, "d", float("nan")))


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    """A journal of a later version is not changed, and not reported as damaged."""
    path = filled(tmp_path / "j")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET schema_version = 99, row_digest = ?", (values_digest("meta", (99,)),))
        connection.execute("UPDATE versions SET tolaria = '7.8.9'")
        connection.execute("CREATE TABLE more (x)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(JournalNewerError, match=r"has schema 99, written by Tolaria 7\.8\.9, and this is") as caught:
        Journal(path)
    assert f"tolaria state downgrade --to {SCHEMA_VERSION} --state-dir {tmp_path}" in str(caught.value)
    assert path.read_bytes() == before
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE versions")
    with pytest.raises(JournalNewerError, match="written by a newer version of Tolaria"):
        Journal(path)


def test_each_version_that_opens_a_journal_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that creates it, and each that follows another one."""
    for version in ("1.0", "1.0", "1.1", "1.1", "1.0"):
        monkeypatch.setattr(database, "__version__", version)
        with Journal(tmp_path / "j") as journal:
            found = [(row.tolaria, row.schema_from, row.schema_to) for row in journal.rows(VersionRow)]
    known = SCHEMA_VERSION
    assert found == [("1.0", 0, known), ("1.1", known, known), ("1.0", known, known)]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE checkpoints SET global_step = 11 WHERE checkpoint_id = 'c1'",
        "UPDATE rollbacks SET latency_ms = 13.0",
        "UPDATE meta SET schema_version = 0",
        "DROP VIEW incidents",
        "ALTER TABLE faults ADD COLUMN more TEXT",
    ],
)
def test_a_change_by_others_is_damage(tmp_path: Path, statement: str) -> None:
    """Values are checked against their row's digest, and the tables against the schema."""
    path = filled(tmp_path / "j")
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(JournalDamagedError):
        Journal(path)


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 500])
def test_a_foreign_file_is_damage(tmp_path: Path, content: bytes) -> None:
    """An empty file or a file of another kind is not a journal."""
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(JournalDamagedError):
        Journal(tmp_path / "j")


def test_a_refusal_by_the_system_is_not_damage(tmp_path: Path) -> None:
    """A journal that cannot be opened is unavailable, and is not moved to the quarantine."""
    with pytest.raises(JournalUnavailableError):
        Journal(tmp_path / "absent" / "j")


def test_commits_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal uses a write-ahead log and syncs it at every commit."""
    connections: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def recorded(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connections.append(connect(*arguments, **options))
        return connections[-1]

    monkeypatch.setattr(sqlite3, "connect", recorded)
    with Journal(tmp_path / "j"):
        pragmas = [connections[-1].execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert pragmas == ["wal", 2]


def test_a_removed_journal_is_unavailable(tmp_path: Path) -> None:
    """SQLite would silently write on into the removed file, and report the row as durable."""
    with Journal(tmp_path / "j") as journal:
        journal.put(ROWS[0])
        (tmp_path / "j").unlink()
        for write in (lambda: journal.put(ROWS[0]), lambda: journal.answer_once(ROWS[6])):  # type: ignore[arg-type]
            with pytest.raises(JournalUnavailableError, match="removed"):
                write()


def test_pruned_checkpoints_are_not_read(tmp_path: Path) -> None:
    """All other checkpoints are, oldest first: the cost of a checkpoint does not grow with the length of a run."""
    row = CheckpointRow("c", 1, "a", 10, 1, 100, "aa", None)
    kept = [
        replace(row, checkpoint_id="late", at_ns=9, state="superseded"),
        replace(row, checkpoint_id="early", at_ns=2),
        replace(row, checkpoint_id="other", at_ns=5, run_id="b"),
    ]
    with Journal(tmp_path / "j") as journal:
        for each in [*kept, replace(row, checkpoint_id="gone", at_ns=4, state="pruned")]:
            journal.put(each)
        assert [found.checkpoint_id for found in journal.checkpoints()] == ["early", "other", "late"]
        assert [found.checkpoint_id for found in journal.restore_points("a")] == ["early"]
        assert len(journal.rows(CheckpointRow)) == 4


def test_a_rollback_supersedes_what_is_not_an_ancestor(tmp_path: Path) -> None:
    """Later checkpoints of the run are superseded, and committed again when the run goes to one of them."""
    row = CheckpointRow("c", 1, "a", 10, 1, 100, "aa", None)
    with Journal(tmp_path / "j") as journal:
        for number, (run_id, step) in enumerate([("a", 10), ("a", 20), ("a", 30), ("b", 40)]):
            journal.put(replace(row, checkpoint_id=f"c{number}", at_ns=number, run_id=run_id, global_step=step))
        back = Lineage().back_to(10, 2)
        assert journal.follow("a", back, "rolled back to step 10", 77) == 2
        assert [found.global_step for found in journal.restore_points("a")] == [10]
        assert [found.global_step for found in journal.restore_points("b")] == [40]
        assert [found.global_step for found in journal.kept_points("a")] == [10, 20, 30]
        rows = journal.rows(CheckpointRow, run_id="a")[1:]
        assert [(found.state, found.detail, found.superseded_at_ns) for found in rows] == [
            ("superseded", "rolled back to step 10", 77)
        ] * 2
        assert journal.follow("a", rows[0].lineage.back_to(20, 3), "undone", 99) == 0
        assert [found.global_step for found in journal.restore_points("a")] == [10, 20]
        assert journal.find(CheckpointRow, "c1") == replace(row, checkpoint_id="c1", at_ns=1, global_step=20)


def test_a_row_is_revised_without_losing_other_changes(tmp_path: Path) -> None:
    """Only the named columns change; a row that does not exist stays away."""
    row = CheckpointRow("c", 1, "a", 10, 1, 100, "aa", None, state="superseded", detail="kept")
    with Journal(tmp_path / "j") as journal:
        journal.put(row)
        journal.revise("c", proven=1)
        journal.revise("unknown", proven=1)
        assert journal.rows(CheckpointRow) == (replace(row, proven=1),)


def test_a_failed_change_of_several_rows_changes_none(tmp_path: Path) -> None:
    """All checkpoints of a run follow a rollback, or none does."""
    row = CheckpointRow("c", 1, "a", 10, 1, 100, "aa", None)
    path = tmp_path / "j"
    with Journal(path) as journal:
        for number in (1, 2):
            journal.put(replace(row, checkpoint_id=f"c{number}", at_ns=number))
        with closing(sqlite3.connect(path)) as other:
            other.execute("UPDATE checkpoints SET epoch = 9 WHERE checkpoint_id = 'c2'")
            other.commit()
        with pytest.raises(JournalDamagedError):
            journal.follow("a", Lineage(2), "back", 5)
        with closing(sqlite3.connect(path)) as other:
            assert other.execute("SELECT DISTINCT state FROM checkpoints").fetchall() == [("committed",)]


def test_operators_calls_are_listed_newest_first(tmp_path: Path) -> None:
    """Those of the same time in the order of writing; a call that has ended replaces its beginning."""
    begun = [AdminCallRow(f"c{n}", 5, "run", "M", f"q{n}", "alice", "operator", "p", "why", n) for n in range(3)]
    with Journal(tmp_path / "j") as journal:
        for row in (*begun, replace(begun[1], outcome="OK")):
            journal.put(row)
        assert [row.call_id for row in journal.admin_calls(10)] == ["c1", "c2", "c0"]
        assert [row.outcome for row in journal.admin_calls(1)] == ["OK"]


def test_the_newest_calls_of_operators_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older ones are removed now and then, also when a service starts with many."""
    monkeypatch.setattr(database, "ADMIN_CALLS_MAX", 4)
    monkeypatch.setattr(database, "_CALLS_BETWEEN", 5)
    path = tmp_path / "journal.sqlite3"
    for first in (0, 30):
        with Journal(path) as journal:
            for number in range(first, first + 30):
                row = AdminCallRow(f"c{number}", number, "run", "M", f"q{number}", "alice", "operator", "p", "why", 1)
                journal.put(row)
                journal.put(replace(row, outcome="OK"))
                assert len(journal.admin_calls(100)) <= 4 + 5
            assert [row.call_id for row in journal.admin_calls(2)] == [f"c{first + 29}", f"c{first + 28}"]
