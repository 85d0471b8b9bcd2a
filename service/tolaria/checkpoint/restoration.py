"""Restoring a backup into a state directory.

Everything is copied into another directory first, and verified there. Renaming this directory is the moment at
which the restoration is decided; what is left then is moving entries, which goes on where it was interrupted. Until it
is complete, no service starts on the directory.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tolaria.checkpoint.archive import BACKUP, Backup, BackupManifest, open_backup
from tolaria.checkpoint.directory import CHECKPOINTS, JOURNAL, LOCK, PEERS, RUN_SETTINGS, SETTINGS
from tolaria.checkpoint.inspection import inspect_storage
from tolaria.errors import BackupDamagedError, BackupError, JournalNewerError, StateRefusedError
from tolaria.filesystem import Filesystem, write_durably
from tolaria.journal.database import SIDE_FILES
from tolaria.journal.rows import SCHEMA_VERSION

REPLACED: Final = "replaced-"
"""Beginning of the names of directories with what a restoration has replaced."""

_COPYING, _REPLACING, _PLACING = ".restore-copying-", ".restore-replacing-", ".restore-placing-"
_PHASES: Final = (_COPYING, _REPLACING, _PLACING)
_JOURNAL_FILES: Final = tuple(JOURNAL + ending for ending in SIDE_FILES)
_NO_STATE: Final = frozenset({LOCK, "lost+found"})


@dataclass(frozen=True, slots=True)
class RestoredBackup:
    """A restored backup. `replaced` is the directory with what was there before; empty if there was nothing."""

    manifest: BackupManifest
    directory: str
    replaced: str


def refuse_unfinished_restore(directory: Path) -> None:
    """Raises StateRefusedError if the restoration of a backup into the directory was interrupted."""
    if found := _begun(directory):
        raise StateRefusedError(
            f"state.dir: the restoration of a backup into {directory} was interrupted: repeat tolaria restore-backup"
            + (f", or remove {found} to do without it" if found.name.startswith(_COPYING) else "")
        )


def restore_backup(source: Path, directory: Path, *, replace: bool, files: Filesystem | None = None) -> RestoredBackup:
    """Restores a backup into an existing directory, which must be locked, and verifies every digest.

    If the process is killed, the directory is as before or `refuse_unfinished_restore` refuses it, and the next call
    goes on. A backup without checkpoints, from before an upgrade, leaves those of the directory in place. With
    `replace` the directory may hold a state, which is moved to a directory in it.

    Raises:
        BackupDamagedError: the backup is not what was written; the directory is as before.
        StateRefusedError: the directory is not empty, or a newer Tolaria made the backup.
        OSError: the directory cannot be written.
    """
    files = files or Filesystem()
    replaced = finish_restore(directory, files)
    with open_backup(source) as backup:
        manifest = backup.manifest
        if manifest.schema > SCHEMA_VERSION:
            raise JournalNewerError(source, manifest.schema, SCHEMA_VERSION, manifest.tolaria)
        if replaced is not None and _is_restored(directory, backup):
            return RestoredBackup(manifest, str(directory), replaced)
        occupied = sorted(name for name in files.names(directory) if name not in _NO_STATE)
        if occupied and not replace:
            raise StateRefusedError(
                f"{directory} is not empty: it has {', '.join(occupied[:5])}{' ...' if len(occupied) > 5 else ''}. "
                "Restore into a new directory, or replace this state with --replace"
            )
        if manifest.purpose != "backup" and not (directory / CHECKPOINTS).is_dir():
            raise StateRefusedError(
                f"{source} is from before an {manifest.purpose} and has no checkpoints: restore it with --replace into "
                "the state directory that it is of"
            )
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        while (directory / f"{REPLACED}{stamp}").exists():
            stamp += "x"
        copied = _copied(backup, directory / f"{_COPYING}{stamp}", files)
        files.rename(copied, directory / f"{_REPLACING}{stamp}")
        files.sync_directory(directory)
    return RestoredBackup(manifest, str(directory), finish_restore(directory, files) or "")


def finish_restore(directory: Path, files: Filesystem) -> str | None:
    """Goes on with a restoration that is decided, and removes one that is not.

    Returns:
        The directory with what was replaced, empty if nothing was; None if there was nothing to go on with.
    """
    for undecided in directory.glob(f"{_COPYING}*"):
        files.remove_tree(undecided)
    begun = _begun(directory)
    if begun is None:
        return None
    stamp = begun.name.rpartition("-")[2]
    old = directory / f"{REPLACED}{stamp}"
    if begun.name.startswith(_REPLACING):
        _move_away(directory, begun, old, files)
        placing = directory / f"{_PLACING}{stamp}"
        files.rename(begun, placing)
        files.sync_directory(directory)
        begun = placing
    for name in files.names(begun):
        if name != BACKUP:
            files.rename(begun / name, directory / name)
    files.sync_directory(directory)
    files.remove_tree(begun)
    files.sync_directory(directory)
    return str(old) if old.exists() else ""


def _begun(directory: Path) -> Path | None:
    """Returns the directory of a restoration that was begun; one that is decided comes first."""
    for phase in reversed(_PHASES):
        if found := sorted(directory.glob(f"{phase}*")):
            return found[0]
    return None


def _is_restored(directory: Path, backup: Backup) -> bool:
    """Whether the directory holds this backup, whose restoration has just been completed."""
    with suppress(OSError, BackupError):
        for file in backup.manifest.files:
            if (directory / file.path).stat().st_size != file.size_bytes:
                return False
            for piece in backup.pieces(file):
                del piece
        return True
    return False


def _copied(backup: Backup, place: Path, files: Filesystem) -> Path:
    """Copies a backup into a new directory, and verifies it there as a state directory."""
    manifest = backup.manifest
    try:
        files.make_directory(place)
        directories = [place]
        for file in manifest.files:
            target = place / file.path
            for parent in reversed([p for p in target.parents if p.is_relative_to(place)]):
                if parent not in directories:
                    files.make_directory(parent)
                    directories.append(parent)
            write_durably(files, target, backup.pieces(file))
        write_durably(files, place / BACKUP, [memoryview(manifest.to_bytes())])
        for directory in reversed(directories):
            files.sync_directory(directory)
        with open_backup(place) as copy:
            copy.verify()
        _inspect(place, manifest)
    except BaseException:
        with suppress(OSError):
            files.remove_tree(place)
        raise
    return place


def _inspect(place: Path, manifest: BackupManifest) -> None:
    """Verifies every digest of the journal and the checkpoints, as `tolaria verify` does."""
    for finding in inspect_storage(place) if manifest.purpose == "backup" else ():
        if finding.bad and finding.name not in manifest.left_out:
            raise BackupDamagedError(str(place), f"{finding.name}: {finding.detail}")


def _move_away(directory: Path, begun: Path, old: Path, files: Filesystem) -> None:
    """Moves the state that is replaced to `old`; the main file of its journal first, which its log must not outlive.

    What a backup does not hold stays: exports, traces, the quarantine.
    """
    new = set(files.names(begun))
    owned = [*_JOURNAL_FILES, SETTINGS, RUN_SETTINGS, PEERS, *([CHECKPOINTS] if CHECKPOINTS in new else [])]
    found = [name for name in owned if (directory / name).exists()]
    if found and not old.exists():
        files.make_directory(old)
    if found:
        files.sync_directory(directory)  # before anything is moved there, which would be lost with it
    for name in found:
        files.rename(directory / name, old / name)
    if old.exists():
        files.sync_directory(old)
