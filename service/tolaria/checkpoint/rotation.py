"""Backups made at regular times: each in a new directory of one folder, of which the oldest are removed."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tolaria.checkpoint.archive import PARTIAL, BackupManifest, open_backup
from tolaria.checkpoint.backup import make_backup
from tolaria.errors import BackupError, StateRefusedError
from tolaria.filesystem import Filesystem, remove_quietly

_NAME: Final = re.compile(r"tolaria-\d{8}T\d{6}Z(-\d+)?")
_SAME_SECOND_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class Rotated:
    """A new backup, the names of those that were removed, and of those that stay but cannot be restored."""

    path: Path
    manifest: BackupManifest
    removed: tuple[str, ...]
    damaged: tuple[str, ...]


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

    Raises as `make_backup` does; StateRefusedError also if there is no such folder.
    """
    if not folder.is_dir():
        raise StateRefusedError(f"--into: there is no directory {folder}")
    stamp = time.strftime("tolaria-%Y%m%dT%H%M%SZ", time.gmtime(clock()))
    names = [stamp, *(f"{stamp}-{number}" for number in range(2, _SAME_SECOND_MAX))]
    path = folder / next(name for name in names if not (folder / name).exists())
    manifest = make_backup(directory, path, without_damaged=without_damaged, on_checkpoint=on_checkpoint)
    removed, damaged = _remove_old(folder, path, keep)
    return Rotated(path, manifest, tuple(removed), tuple(damaged))


def _remove_old(folder: Path, newest: Path, keep: int) -> tuple[list[str], list[str]]:
    """Removes old backups; returns the names of the removed and of the damaged ones."""
    whole, damaged, files = list[tuple[int, Path]](), list[str](), Filesystem()
    for place in sorted(folder.iterdir()):
        if place.suffix == PARTIAL and _NAME.fullmatch(place.stem) and _is_abandoned(place):
            remove_quietly(files, place)
        elif _NAME.fullmatch(place.name) and place != newest:
            try:
                with open_backup(place) as backup:
                    whole.append((backup.manifest.created_at_ns, place))
            except (BackupError, StateRefusedError, OSError):
                damaged.append(place.name)
    # The new one stays whatever the clock says, which may have been set back.
    old = [place for _, place in sorted(whole)][: max(0, len(whole) - keep + 1)] if keep else []
    for place in old:
        _remove(files, place)
    return [place.name for place in old if not place.exists()], damaged


def _remove(files: Filesystem, place: Path) -> None:
    """Removes a backup, which loses its name first: what is left of it after a kill or a loss of power has none."""
    gone = place.with_name(place.name + PARTIAL)
    with suppress(OSError):
        files.rename(place, gone)
        files.sync_directory(place.parent)
        remove_quietly(files, gone)


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
