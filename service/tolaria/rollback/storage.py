"""Opening a state directory: its journal, repaired if it is damaged, and its checkpoints, agreeing with each other.

Owns the order of a start and the setting aside of a damaged journal. Must not know what is resumed or why.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from tolaria.errors import JournalDamagedError, JournalUnavailableError
from tolaria.rollback.checkpoint_store import QUARANTINE, CheckpointStore, Recovery
from tolaria.rollback.journal import SIDE_FILES, Journal
from tolaria.rollback.journal_rows import FaultRow

if TYPE_CHECKING:
    from pathlib import Path

    from tolaria.rollback.filesystem import Filesystem
    from tolaria.rollback.retention import Retention

JOURNAL: Final = "journal.sqlite3"


@dataclass(frozen=True, slots=True)
class Storage:
    """What a run keeps on disk. `journal_damage` tells why the journal had to be rebuilt; None: it was whole."""

    journal: Journal
    checkpoints: CheckpointStore
    recovery: Recovery
    journal_damage: str | None

    def for_run(self, run_id: str) -> Storage:
        """The same storage as another run sees it: which run goes on is known only once the journal has been read."""
        return replace(self, checkpoints=self.checkpoints.for_run(run_id))


def open_storage(directory: Path, *, run_id: str, retention: Retention, files: Filesystem | None = None) -> Storage:
    """Open the state directory, making it if need be, and put right what a crash or a failing disk left.

    A damaged journal goes to the quarantine, and a new one is filled from the checkpoints' manifests: which runs,
    commands and requests there were is lost, and is to be read in the quarantined file; what can be restored is not.

    Raises:
        JournalNewerError: a newer Tolaria wrote the journal.
        JournalUnavailableError: the system refused; nothing has been changed.
        OSError: the directory cannot be made or listed.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / JOURNAL
    damage: str | None = None
    try:
        journal = Journal(path)
    except JournalDamagedError as error:
        damage = str(error)
        _set_aside(path, directory / QUARANTINE)
        journal = Journal(path)
    try:
        if damage is not None:
            journal.put(FaultRow(uuid.uuid4().hex, time.time_ns(), run_id, "journal_rebuilt", -1, "open", damage))
        store = CheckpointStore(directory, journal, run_id=run_id, retention=retention, files=files)
        return Storage(journal, store, store.recover(), damage)
    except BaseException:
        journal.close()
        raise


def _set_aside(path: Path, quarantine: Path) -> None:
    """The main file first: without it SQLite throws a stale log away, while a log alone would be lost otherwise."""
    name = f"{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        quarantine.mkdir(mode=0o700, exist_ok=True)
        for ending in SIDE_FILES:
            part = path.with_name(path.name + ending)
            if part.exists():
                part.rename(quarantine / (name + ending))
    except OSError as error:
        raise JournalUnavailableError(f"a damaged journal cannot be set aside: {error}") from error
