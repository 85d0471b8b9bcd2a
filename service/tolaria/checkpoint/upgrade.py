"""The schema of a state directory: upgrades in place, downgrades, and what `tolaria state show` reports.

The journal records the schema of the whole directory, and its transaction is the moment at which a directory has
another one. Checkpoints have been of one format in all schemas. A change of the format of any file raises the
schema; it must leave what the older schema reads in place until the journal has been committed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import xxhash

from tolaria import __version__
from tolaria.checkpoint.archive import PARTIAL, BackupManifest, Purpose, open_backup
from tolaria.checkpoint.backup import make_backup
from tolaria.checkpoint.directory import BACKUPS, JOURNAL
from tolaria.errors import BackupError, JournalNewerError, StateRefusedError
from tolaria.filesystem import Filesystem, remove_quietly
from tolaria.journal.database import remove_database
from tolaria.journal.migration import OLDEST_SCHEMA, OpenJournal
from tolaria.journal.reader import copy_journal, read_journal, schema_of
from tolaria.journal.rows import SCHEMA_VERSION, CheckpointRow, RunRow, VersionRow

BACKUPS_KEPT: Final = 3
"""Copies from before an upgrade or a downgrade that are kept. Each is about as large as the journal."""


@dataclass(frozen=True, slots=True)
class Upgrade:
    """A change of schema. `backup` is the path of the copy from before it, relative to the state directory.

    `lost` counts the rows of tables that the new schema does not have, which only the backup has.
    """

    schema_from: int
    schema_to: int
    backup: str
    lost: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StateDescription:
    """A state directory as `tolaria state show` prints it. `written_by` is empty if it is unknown.

    `runs`, `checkpoints` and `versions` are empty if a newer Tolaria wrote the directory.
    """

    directory: str
    schema: int
    supported: int
    tolaria: str
    written_by: str
    verdict: str
    runs: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    versions: tuple[VersionRow, ...] = ()
    backups: tuple[tuple[str, BackupManifest], ...] = ()


def upgrade_state(directory: Path, files: Filesystem | None = None) -> Upgrade | None:
    """Brings the directory, which must be locked, to the present schema; returns None if there is nothing to do.

    A backup is made first, in `backups`. If the process is killed at any moment, the directory has its old schema or
    the new one, with all of its content, and the next call completes the upgrade.

    Raises:
        JournalDamagedError, JournalNewerError, JournalUnavailableError: see `OpenJournal`; nothing has changed.
        BackupError: the directory cannot be backed up; nothing has changed.
    """
    if not (directory / JOURNAL).exists():
        return None
    with OpenJournal(directory / JOURNAL) as journal:
        schema = journal.schema
        if schema == SCHEMA_VERSION:
            return None
        backup = _backed_up(directory, "upgrade", files or Filesystem())
        journal.upgrade(backup)
    _remove_old_backups(directory, files or Filesystem())
    return Upgrade(schema, SCHEMA_VERSION, backup)


def downgrade_state(directory: Path, target: int, files: Filesystem | None = None) -> Upgrade:
    """Brings the directory, which must be locked, to an older schema, after a backup; as safe as an upgrade.

    Raises:
        StateRefusedError: the schema is no older one, or cannot hold this state; nothing has changed.
        JournalDamagedError, JournalNewerError, JournalUnavailableError, BackupError: as `upgrade_state`.
    """
    with OpenJournal(directory / JOURNAL) as journal:
        schema = journal.schema
        if not OLDEST_SCHEMA <= target < schema:
            older = ", ".join(str(number) for number in range(OLDEST_SCHEMA, schema)) or "none"
            raise StateRefusedError(f"--to {target}: {directory} has schema {schema}; older ones: {older}")
        journal.refuse_downgrade(target)
        backup = _backed_up(directory, "downgrade", files or Filesystem())
        lost = journal.downgrade(target)
    _remove_old_backups(directory, files or Filesystem())
    return Upgrade(schema, target, backup, lost)


def describe_state(directory: Path) -> StateDescription:
    """Describes a state directory, also one that a service is using, or that a newer Tolaria wrote. Changes nothing.

    Raises:
        JournalDamagedError, JournalUnavailableError: the journal cannot be read.
    """
    try:
        schema = schema_of(directory / JOURNAL)
    except JournalNewerError as error:
        verdict = f"refused: {error}"
        return StateDescription(str(directory), error.found, SCHEMA_VERSION, __version__, error.writer, verdict)
    path = directory / JOURNAL
    kept = [row for row in read_journal(path, CheckpointRow) if row.state in {"committed", "superseded"}]
    versions = read_journal(path, VersionRow)
    verdict = "present: this version uses it as it is"
    if schema < SCHEMA_VERSION:
        verdict = f"older: the next start upgrades it to schema {SCHEMA_VERSION}, after a backup in {BACKUPS}"
    return StateDescription(
        str(directory),
        schema,
        SCHEMA_VERSION,
        __version__,
        versions[-1].tolaria if versions else "",
        verdict,
        runs=len(read_journal(path, RunRow)),
        checkpoints=len(kept),
        checkpoint_bytes=sum(row.size_bytes for row in kept),
        versions=versions,
        backups=tuple(_backups(directory)),
    )


def _backed_up(directory: Path, purpose: Purpose, files: Filesystem) -> str:
    """Makes a backup without checkpoints, unless a whole one of the same journal exists; returns its path."""
    place = directory / BACKUPS
    place.mkdir(mode=0o700, exist_ok=True)
    scratch = place / ".scratch"
    try:
        copy_journal(directory / JOURNAL, scratch)
        digest = xxhash.xxh3_128_hexdigest(scratch.read_bytes())
    finally:
        remove_database(scratch)
    for name, manifest in _backups(directory):
        if digest in {file.digest for file in manifest.files if file.path == JOURNAL}:
            return name
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = [f"before-{purpose}-{stamp}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 100)))]
    name = next(name for name in names if not (place / name).exists())
    make_backup(directory, place / name, purpose=purpose, files=files)
    files.sync_directory(directory)
    return f"{BACKUPS}/{name}"


def _backups(directory: Path) -> list[tuple[str, BackupManifest]]:
    """Returns the paths and manifests of the whole backups in the directory, the oldest first."""
    found = []
    for place in sorted((directory / BACKUPS).glob("before-*")):
        if place.suffix == PARTIAL:
            continue
        with suppress(BackupError, StateRefusedError, OSError), open_backup(place) as backup:
            backup.verify()
            found.append((f"{BACKUPS}/{place.name}", backup.manifest))
    return sorted(found, key=lambda entry: entry[1].created_at_ns)


def _remove_old_backups(directory: Path, files: Filesystem) -> None:
    for name, _ in _backups(directory)[:-BACKUPS_KEPT]:
        remove_quietly(files, directory / name)
    for place in (directory / BACKUPS).glob(f"before-*{PARTIAL}"):  # of a process that was killed
        remove_quietly(files, place)
