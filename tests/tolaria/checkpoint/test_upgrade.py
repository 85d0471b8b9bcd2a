from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tolaria import __version__
from tolaria.checkpoint.archive import open_backup
from tolaria.checkpoint.format import FORMAT
from tolaria.checkpoint.inspection import Condition, inspect_storage
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.checkpoint.upgrade import BACKUPS_KEPT, describe_state, downgrade_state, upgrade_state
from tolaria.errors import JournalUnavailableError, StateRefusedError
from tolaria.images import canonical_json
from tolaria.journal.migration import OpenJournal
from tolaria.journal.reader import schema_of
from tolaria.journal.rows import SCHEMA_VERSION, values_digest

RETENTION = Retention(last=3, best="highest")


def backups(directory: Path) -> list[str]:
    """The names of the copies from before changes of the schema."""
    return sorted(path.name for path in (directory / "backups").iterdir())


def test_opening_upgrades_once_after_a_backup(old_state: Path) -> None:
    """The backup is of the old schema; a second start upgrades nothing."""
    storage = open_storage(old_state, run_id="r", retention=RETENTION)
    storage.journal.close()
    assert storage.upgrade is not None
    assert (storage.upgrade.schema_from, storage.upgrade.schema_to) == (1, SCHEMA_VERSION)
    with open_backup(old_state / storage.upgrade.backup) as backup:
        backup.verify()
        assert (backup.manifest.schema, backup.manifest.purpose, backup.manifest.checkpoints) == (1, "upgrade", ())
    again = open_storage(old_state, run_id="r", retention=RETENTION)
    again.journal.close()
    assert again.upgrade is None
    assert len(backups(old_state)) == 1
    found = describe_state(old_state)
    assert (found.schema, found.written_by, found.checkpoints) == (SCHEMA_VERSION, __version__, 3)
    assert [(row.schema_from, row.backup) for row in found.versions] == [(1, storage.upgrade.backup)]


def test_an_upgrade_that_keeps_failing_does_not_fill_the_disk(old_state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt uses the copy of the first one."""

    def fail(_journal: OpenJournal, _backup: str) -> None:
        raise JournalUnavailableError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(OpenJournal, "upgrade", fail)
        for _ in range(3):
            with pytest.raises(JournalUnavailableError):
                open_storage(old_state, run_id="r", retention=RETENTION)
    assert schema_of(old_state / "journal.sqlite3") == 1
    (only,) = backups(old_state)
    done = upgrade_state(old_state)
    assert done is not None
    assert done.backup == f"backups/{only}"


def test_old_copies_are_removed(old_state: Path) -> None:
    """The newest few stay, whether they are from before upgrades or downgrades."""
    for _ in range(3):
        upgrade_state(old_state)
        with closing(sqlite3.connect(old_state / "journal.sqlite3")) as connection:
            connection.execute("UPDATE versions SET backup = backup")
        downgrade_state(old_state, 3)
        downgrade_state(old_state, 2)
    assert len(backups(old_state)) == BACKUPS_KEPT
    assert schema_of(old_state / "journal.sqlite3") == 2


@pytest.mark.parametrize("target", [0, SCHEMA_VERSION, SCHEMA_VERSION + 1, -1])
def test_a_schema_that_is_no_older_one_is_refused(target: int, old_state: Path) -> None:
    """The message lists those that are."""
    upgrade_state(old_state)
    with pytest.raises(StateRefusedError, match=rf"--to {target}: .*has schema {SCHEMA_VERSION}; older ones: 1, 2"):
        downgrade_state(old_state, target)


def test_a_newer_directory_is_described(old_state: Path) -> None:
    """As far as this version can read it: its schema, and the version that wrote it."""
    upgrade_state(old_state)
    with closing(sqlite3.connect(old_state / "journal.sqlite3")) as connection:
        connection.execute("UPDATE meta SET schema_version = 99, row_digest = ?", (values_digest("meta", (99,)),))
        connection.execute("UPDATE versions SET tolaria = '7.8.9'")
        connection.commit()
    found = describe_state(old_state)
    assert (found.schema, found.written_by, found.checkpoints) == (99, "7.8.9", 0)
    assert found.verdict.startswith("refused: ")


def test_a_checkpoint_of_a_newer_format_stays_in_place(old_state: Path) -> None:
    """It is not damaged: it is not moved to the quarantine, and an older one is loaded."""
    newest = old_state / "checkpoints" / "000000001890-90c43982"
    content = (newest / "manifest.json").read_bytes()
    import json

    import xxhash

    document = json.loads(content)
    del document["manifest_digest"]
    document["format"] = FORMAT + 1
    digest = xxhash.xxh3_128_hexdigest(canonical_json(document))
    (newest / "manifest.json").write_bytes(canonical_json({**document, "manifest_digest": digest}))
    assert [f.condition for f in inspect_storage(old_state)].count(Condition.UNREADABLE) == 1
    storage = open_storage(old_state, run_id="2e10f889c48b", retention=RETENTION)
    with storage.journal:
        loaded = storage.checkpoints.load_newest()
    assert loaded.row.global_step == 1845
    assert [(damage.checkpoint_id, damage.quarantined) for damage in loaded.damaged] == [(newest.name, False)]
    assert f"format {FORMAT + 1} of a newer Tolaria" in loaded.damaged[0].reason
    assert newest.is_dir()
