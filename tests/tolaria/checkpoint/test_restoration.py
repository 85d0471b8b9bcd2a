from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tolaria.checkpoint.archive import BACKUP, open_backup
from tolaria.checkpoint.backup import make_backup
from tolaria.checkpoint.inspection import Condition, inspect_storage
from tolaria.checkpoint.restoration import refuse_unfinished_restore, restore_backup
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.errors import JournalNewerError, StateRefusedError
from tolaria.journal.reader import read_journal, schema_of
from tolaria.journal.rows import SCHEMA_VERSION, CommandRow

RETENTION = Retention(last=3, best="highest")


@pytest.fixture
def copy(old_state: Path, tmp_path: Path) -> Path:
    """A backup of the old state."""
    make_backup(old_state, tmp_path / "copy")
    return tmp_path / "copy"


def names(directory: Path) -> list[str]:
    """The names in a directory, sorted."""
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("occupied", [[], ["lock"], ["lost+found", "lock"]])
def test_a_backup_is_restored_into_an_empty_directory(occupied: list[str], copy: Path, tmp_path: Path) -> None:
    """The lock, and what a new file system has, do not count. The state is that of the backup."""
    target = tmp_path / "new"
    target.mkdir()
    for name in occupied:
        (target / name).touch()
    restored = restore_backup(copy, target, replace=False)
    assert restored.replaced == ""
    assert names(target) == sorted(["checkpoints", "journal.sqlite3", *occupied])
    assert all(finding.condition is Condition.WHOLE for finding in inspect_storage(target))
    assert read_journal(target / "journal.sqlite3", CommandRow) == read_journal(copy / "journal.sqlite3", CommandRow)


@pytest.mark.parametrize("name", ["journal.sqlite3", "notes.txt", "checkpoints"])
def test_anything_else_in_the_directory_refuses_it(name: str, copy: Path, tmp_path: Path) -> None:
    """It is named, and nothing is changed."""
    target = tmp_path / "new"
    target.mkdir()
    (target / name).write_text("mine")
    with pytest.raises(StateRefusedError, match=rf"is not empty: it has {name}.*--replace"):
        restore_backup(copy, target, replace=False)
    assert names(target) == [name]
    assert (target / name).read_text() == "mine"


def test_a_replaced_state_is_kept(copy: Path, old_state: Path) -> None:
    """With its log; exports and traces stay in place. It can be put back by hand."""
    with closing(sqlite3.connect(old_state / "journal.sqlite3")) as connection:
        connection.execute("PRAGMA user_version = 7")
    (old_state / "journal.sqlite3-wal").write_bytes(b"")
    (old_state / "exports").mkdir()
    restored = restore_backup(copy, old_state, replace=True)
    kept = Path(restored.replaced)
    assert kept.parent == old_state
    assert {"journal.sqlite3", "journal.sqlite3-wal", "checkpoints"} <= set(names(kept))
    assert "journal.sqlite3-wal" not in names(old_state)
    assert (old_state / "exports").is_dir()
    with closing(sqlite3.connect(kept / "journal.sqlite3")) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (7,)
    assert all(finding.condition is Condition.WHOLE for finding in inspect_storage(old_state))
    again = restore_backup(copy, old_state, replace=True)
    assert again.replaced != restored.replaced


@pytest.mark.parametrize("phase", ["copying", "replacing", "placing"])
def test_a_directory_with_an_interrupted_restoration_is_refused(phase: str, copy: Path, tmp_path: Path) -> None:
    """A service does not begin a new run beside it; the message says what to do."""
    target = tmp_path / "new"
    (target / f".restore-{phase}-20260101T000000Z").mkdir(parents=True)
    with pytest.raises(StateRefusedError, match="was interrupted: repeat tolaria restore-backup"):
        open_storage(target, run_id="r", retention=RETENTION)
    assert not (target / "journal.sqlite3").exists()
    restore_backup(copy, target, replace=False)
    refuse_unfinished_restore(target)
    assert all(finding.condition is Condition.WHOLE for finding in inspect_storage(target))


def test_the_copy_from_before_an_upgrade_goes_back_beside_its_checkpoints(old_state: Path, tmp_path: Path) -> None:
    """It has no checkpoints: those of the directory stay. Into an empty directory it is refused."""
    storage = open_storage(old_state, run_id="r", retention=RETENTION)
    storage.journal.close()
    assert storage.upgrade is not None
    backup = old_state / storage.upgrade.backup
    (tmp_path / "new").mkdir()
    with pytest.raises(StateRefusedError, match="from before an upgrade and has no checkpoints"):
        restore_backup(backup, tmp_path / "new", replace=False)
    restored = restore_backup(backup, old_state, replace=True)
    assert names(Path(restored.replaced)) == ["journal.sqlite3"]
    assert schema_of(old_state / "journal.sqlite3") == 1
    assert all(finding.condition is Condition.WHOLE for finding in inspect_storage(old_state))


def test_a_backup_of_a_newer_schema_is_refused(copy: Path, tmp_path: Path) -> None:
    """The message names the version that made it."""
    with open_backup(copy) as backup:
        newer = replace(backup.manifest, schema=SCHEMA_VERSION + 1, tolaria="7.8.9")
    (copy / BACKUP).write_bytes(newer.to_bytes())
    (tmp_path / "new").mkdir()
    with pytest.raises(JournalNewerError, match=rf"schema {SCHEMA_VERSION + 1}, written by Tolaria 7\.8\.9"):
        restore_backup(copy, tmp_path / "new", replace=False)
    assert names(tmp_path / "new") == []
