"""A state directory: its checkpoints and its journal, which is rebuilt if it is damaged."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from tolaria.checkpoint.store import QUARANTINE, CheckpointStore, Repairs, Retention
from tolaria.errors import JournalDamagedError, JournalUnavailableError
from tolaria.journal.database import SIDE_FILES, Journal
from tolaria.journal.rows import FaultRow

if TYPE_CHECKING:
    from pathlib import Path

    from tolaria.filesystem import Filesystem

JOURNAL: Final = "journal.sqlite3"
SETTINGS: Final = "settings.json"
"""The settings of the newest run's last process, without secrets."""

RUN_SETTINGS: Final = "runs"
"""The folder with the settings of each run's last process, as `<run id>.json`."""


@dataclass(frozen=True, slots=True)
class Storage:
    """What a run keeps on disk. `journal_damage` says why the journal had to be rebuilt; None: it was intact."""

    journal: Journal
    checkpoints: CheckpointStore
    repairs: Repairs
    journal_damage: str | None

    def for_run(self, run_id: str) -> Storage:
        """Returns the storage for another run: which run is resumed is known only once the journal has been read."""
        return replace(self, checkpoints=self.checkpoints.for_run(run_id))


def open_storage(directory: Path, *, run_id: str, retention: Retention, files: Filesystem | None = None) -> Storage:
    """Opens a state directory, created if missing, and repairs what a crash or a failing disk left behind.

    Moves a damaged journal to the quarantine and fills a new one from the checkpoints' manifests. The history of runs,
    commands and requests is then only in the quarantined file; every checkpoint can still be restored.

    Raises:
        JournalNewerError: a newer Tolaria wrote the journal.
        JournalUnavailableError: the journal cannot be opened or written; nothing has changed.
        OSError: the directory cannot be created or listed.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / JOURNAL
    damage: str | None = None
    try:
        journal = Journal(path)
    except JournalDamagedError as error:
        damage = str(error)
        _move_to_quarantine(path, directory / QUARANTINE)
        journal = Journal(path)
    try:
        if damage is not None:
            journal.put(FaultRow(uuid.uuid4().hex, time.time_ns(), run_id, "journal_rebuilt", -1, "open", damage))
        store = CheckpointStore(directory, journal, run_id=run_id, retention=retention, files=files)
        return Storage(journal, store, store.repair(), damage)
    except BaseException:
        journal.close()
        raise


def _move_to_quarantine(path: Path, quarantine: Path) -> None:
    """Moves the main file first: after a crash in between, a main file without its log would look intact."""
    name = f"{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        quarantine.mkdir(mode=0o700, exist_ok=True)
        for ending in SIDE_FILES:
            part = path.with_name(path.name + ending)
            if part.exists():
                part.rename(quarantine / (name + ending))
    except OSError as error:
        raise JournalUnavailableError(f"a damaged journal cannot be moved to the quarantine: {error}") from error
