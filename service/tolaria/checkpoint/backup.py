"""Backups of a state directory, also of one that a service is using: a consistent copy of journal and checkpoints.

No lock is needed. The journal is copied within one read transaction. The files of the checkpoints that this copy names
are opened as it begins: as long as they are open they can be read, even if retention removes them. If one has been
removed before it was opened, a newer copy of the journal does not name it.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tolaria import __version__
from tolaria.checkpoint.archive import BackupManifest, Purpose, open_writer
from tolaria.checkpoint.directory import CHECKPOINTS, JOURNAL, PEERS, RUN_SETTINGS, SETTINGS
from tolaria.checkpoint.format import FILES, read_checkpoint
from tolaria.errors import BackupError, CheckpointDamagedError, CheckpointUnreadableError
from tolaria.filesystem import Filesystem
from tolaria.journal.database import remove_database
from tolaria.journal.reader import copy_journal, read_journal, schema_of
from tolaria.journal.rows import CheckpointRow

_WAIT_S: Final = 3.0
"""How long a checkpoint that the journal names may have no files: retention on a full disk removes these first."""
_WAIT_IN_ALL_S: Final = 60.0
"""The same, where it is another one each time: checkpoints are removed soon after they are written."""
_PAUSE_S: Final = 0.05


@dataclass(slots=True)
class _Pins:
    """Open descriptors by path in the state directory, and the rows of the checkpoints that they belong to."""

    schema: int
    rows: list[CheckpointRow]
    descriptors: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Ids of checkpoints that cannot be opened, with the reason."""

    def open(self, directory: Path, path: str) -> None:
        self.descriptors[path] = os.open(directory / path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()


class _PinnedFiles(Filesystem):
    """Opens the pinned files by their descriptors."""

    def __init__(self, directory: Path, pins: _Pins) -> None:
        self._directory, self._pins = directory, pins

    def open(self, path: Path) -> int:
        try:
            descriptor = self._pins.descriptors[str(path.relative_to(self._directory))]
        except KeyError:
            raise FileNotFoundError(path) from None
        os.lseek(descriptor, 0, os.SEEK_SET)
        return os.dup(descriptor)


def make_backup(
    directory: Path,
    to: Path,
    *,
    purpose: Purpose = "backup",
    without_damaged: bool = False,
    files: Filesystem | None = None,
    on_checkpoint: Callable[[str], None] = lambda _checkpoint_id: None,
) -> BackupManifest:
    """Writes a backup of a state directory to the new directory or .tar file `to`, and reads it back.

    It has the journal, every checkpoint that can be restored, the record of settings and what the embedded peers keep;
    for an upgrade or a downgrade it has no checkpoints. Every digest of every checkpoint is verified. Holds one
    checkpoint in memory at a time, after calling `on_checkpoint` with its id. `without_damaged` leaves out checkpoints
    that are damaged or gone instead of failing.

    Raises:
        BackupError: a checkpoint is damaged or gone, or a file of the directory cannot be read.
        StateRefusedError: `to` exists, or its name does not do.
        JournalError: the journal cannot be read, or a newer Tolaria wrote it.
        OSError: the backup cannot be written.
    """
    with open_writer(to, files) as writer, _pinned(directory, writer.scratch, purpose) as pins:
        damaged = dict(pins.missing)
        for row in pins.rows:
            on_checkpoint(row.checkpoint_id)
            if row.checkpoint_id not in damaged and (problem := _problem(directory, pins, row)):
                damaged[row.checkpoint_id] = problem
        if damaged and not without_damaged:
            listed = "; ".join(f"{checkpoint_id}: {problem}" for checkpoint_id, problem in damaged.items())
            raise BackupError(
                f"{len(damaged)} of {len(pins.rows)} checkpoints are not what was written: {listed}. "
                "--without-damaged makes a backup of the others; the next start of the service sets these aside"
            )
        left_out = {f"{CHECKPOINTS}/{checkpoint_id}" for checkpoint_id in damaged}
        copied = [
            writer.add(path, descriptor)
            for path, descriptor in pins.descriptors.items()
            if path.rpartition("/")[0] not in left_out
        ]
        ids = [row.checkpoint_id for row in pins.rows]
        manifest = BackupManifest(
            tolaria=__version__,
            schema=pins.schema,
            created_at_ns=time.time_ns(),
            purpose=purpose,
            checkpoints=tuple(name for name in ids if name not in damaged),
            left_out=tuple(damaged),
            files=tuple(copied),
        )
        writer.finish(manifest)
    return manifest


@contextmanager
def _pinned(directory: Path, scratch: Path, purpose: Purpose) -> Iterator[_Pins]:
    """Copies the journal to `scratch`, and opens this copy and the files of all checkpoints that it names."""
    since_s, until_s = dict[str, float](), time.monotonic() + _WAIT_IN_ALL_S
    with ExitStack() as stack:
        stack.callback(remove_database, scratch)
        while True:
            pins, now_s = _pins(directory, scratch, purpose), time.monotonic()
            since_s = {checkpoint_id: since_s.get(checkpoint_id, now_s) for checkpoint_id in pins.missing}
            if not pins.missing or now_s >= until_s or now_s - min(since_s.values()) >= _WAIT_S:
                break
            pins.close()  # a newer state of the journal may not name what is missing any more
            time.sleep(_PAUSE_S)
        stack.callback(pins.close)
        yield pins


def _pins(directory: Path, scratch: Path, purpose: Purpose) -> _Pins:
    early = _Pins(0, [])
    try:
        copy_journal(
            directory / JOURNAL,
            scratch,
            on_state=None if purpose != "backup" else lambda connection: _open_early(directory, connection, early),
        )
        rows = [row for row in read_journal(scratch, CheckpointRow) if row.state in {"committed", "superseded"}]
        pins = _Pins(schema_of(scratch), [] if purpose != "backup" else rows)
        pins.descriptors[JOURNAL] = os.open(scratch, os.O_RDONLY | os.O_CLOEXEC)
        scratch.unlink()
        for row in pins.rows:
            paths = [f"{CHECKPOINTS}/{row.checkpoint_id}/{name}" for name in FILES]
            pins.descriptors |= {path: early.descriptors.pop(path) for path in paths if path in early.descriptors}
            try:
                for path in paths:
                    if path not in pins.descriptors:
                        pins.open(directory, path)
            except OSError as error:
                pins.missing[row.checkpoint_id] = str(error.strerror or error)
    finally:
        early.close()
    for path in _other_files(directory):
        with suppress(FileNotFoundError):  # the peers remove the files of old runs
            pins.open(directory, path)
    return pins


def _open_early(directory: Path, connection: sqlite3.Connection, pins: _Pins) -> None:
    """Opens the files of the checkpoints that can be restored before the journal is copied.

    A copy takes longer than some checkpoints last. What cannot be opened, or read, is looked at again afterwards. A
    copy that is begun again begins here again.
    """
    pins.close()
    with suppress(sqlite3.Error):
        query = "SELECT checkpoint_id FROM checkpoints WHERE state IN ('committed', 'superseded')"
        for (checkpoint_id,) in connection.execute(query).fetchall():
            try:
                for name in FILES:
                    pins.open(directory, f"{CHECKPOINTS}/{checkpoint_id}/{name}")
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE}:  # the copy needs some too
                    pins.close()
                    return
            except ValueError:  # no id that can be in a path
                continue


def _other_files(directory: Path) -> Sequence[str]:
    """Returns paths of files that are replaced as a whole, never written in place."""
    peers = directory / PEERS
    found = [f"{PEERS}/{path.name}" for path in sorted(peers.glob("*.json"))] if peers.is_dir() else []
    runs = directory / RUN_SETTINGS
    found += [f"{RUN_SETTINGS}/{path.name}" for path in sorted(runs.glob("*.json"))] if runs.is_dir() else []
    return [SETTINGS, *found]


def _problem(directory: Path, pins: _Pins, row: CheckpointRow) -> str:
    """Returns why a checkpoint is not what was written; empty if it is."""
    try:
        manifest, _ = read_checkpoint(_PinnedFiles(directory, pins), directory / CHECKPOINTS / row.checkpoint_id)
    except (CheckpointDamagedError, CheckpointUnreadableError) as error:
        return f"{error.stage}, {error.reason}"
    return "" if manifest.fingerprint.total == row.digest else "another digest than the journal's"
