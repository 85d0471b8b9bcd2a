"""Backups made at regular times: each in a new directory of one folder, of which the oldest are removed."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tolaria.checkpoint.archive import PARTIAL, BackupManifest, open_backup
from tolaria.checkpoint.backup import make_backup
from tolaria.checkpoint.directory import JOURNAL
from tolaria.errors import BackupError, JournalError, StateRefusedError
from tolaria.filesystem import Filesystem, remove_quietly
from tolaria.journal.reader import read_journal
from tolaria.journal.rows import RunRow

_NAME: Final = re.compile(r"tolaria-\d{8}T\d{6}Z(-\d+)?")
_SAME_SECOND_MAX: Final = 100

OWNER: Final = "state-of-these-backups"
"""File in a folder of backups with the id of the first run of their state directory."""


@dataclass(frozen=True, slots=True)
class Rotated:
    """A new backup, the names of those that were removed, of those that cannot be restored, and what could not go.

    `damaged` ones stay and are not counted; `unremoved` has a sentence for each old one that is not wholly removed.
    """

    path: Path
    manifest: BackupManifest
    removed: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    unremoved: tuple[str, ...] = ()


def make_rotated_backup(
    directory: Path,
    folder: Path,
    keep: int,
    *,
    without_damaged: bool = False,
    on_checkpoint: Callable[[str], None] = lambda _checkpoint_id: None,
    clock: Callable[[], float] = time.time,
) -> Rotated:
    """Makes a backup of a state directory in `folder`, then removes all but the newest `keep` that it has, if not 0.

    Only backups with names of this function are removed, and what a killed process has left of one. Those without a
    readable manifest are not counted and stay. If the new backup cannot be made, nothing is removed.

    Raises as `make_backup` does; StateRefusedError also if there is no such folder, or another state's backups are
    there: they would be removed in their turn.
    """
    if not folder.is_dir():
        raise StateRefusedError(f"there is no directory {folder} for backups")
    _claim(folder, directory)
    stamp = time.strftime("tolaria-%Y%m%dT%H%M%SZ", time.gmtime(clock()))
    names = [stamp, *(f"{stamp}-{number}" for number in range(2, _SAME_SECOND_MAX))]
    path = folder / next(name for name in names if not (folder / name).exists())
    manifest = make_backup(directory, path, without_damaged=without_damaged, on_checkpoint=on_checkpoint)
    return _remove_old(folder, Rotated(path, manifest), keep)


def _claim(folder: Path, directory: Path) -> None:
    """Notes whose backups a folder has, by the first run of the state directory. Raises StateRefusedError."""
    with suppress(JournalError):
        rows = read_journal(directory / JOURNAL, RunRow)
        first = min(rows, key=lambda row: row.at_ns, default=None)
        if first is None:
            return
        owner = folder / OWNER
        known = owner.read_text(encoding="utf-8").strip() if owner.exists() else ""
        if known and known != first.run_id:
            raise StateRefusedError(
                f"{folder} has the backups of another state directory, whose first run is {known}; that of {directory} "
                f"is {first.run_id}: give each a separate directory, or remove {owner}"
            )
        if not known:
            owner.write_text(f"{first.run_id}\n", encoding="utf-8")


def _remove_old(folder: Path, made: Rotated, keep: int) -> Rotated:
    """Removes old backups, and adds to `made` what has become of them."""
    whole, damaged, files = list[tuple[int, Path]](), list[str](), Filesystem()
    for place in sorted(folder.iterdir()):
        if place.suffix == PARTIAL and _NAME.fullmatch(place.stem) and _is_abandoned(place):
            remove_quietly(files, place)
        elif _NAME.fullmatch(place.name) and place != made.path:
            try:
                with open_backup(place) as backup:
                    whole.append((backup.manifest.created_at_ns, place))
            except (BackupError, StateRefusedError, OSError):
                damaged.append(place.name)
    # The new one stays whatever the clock says, which may have been set back.
    old = [place for _, place in sorted(whole)][: max(0, len(whole) - keep + 1)] if keep else []
    problems = {place.name: _removed(files, place) for place in old}
    return replace(
        made,
        removed=tuple(name for name, problem in problems.items() if not problem),
        damaged=tuple(damaged),
        unremoved=tuple(f"{name} cannot be removed: {problem}" for name, problem in problems.items() if problem),
    )


def _removed(files: Filesystem, place: Path) -> str:
    """Removes a backup; returns why it could not.

    It loses its name first: what is left of it after a kill or a loss of power has none.
    """
    gone = place.with_name(place.name + PARTIAL)
    try:
        files.rename(place, gone)
        files.sync_directory(place.parent)
        files.remove_tree(gone)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _is_abandoned(partial: Path) -> bool:
    """Whether no process writes this backup: a writer holds the lock of its directory."""
    try:
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
