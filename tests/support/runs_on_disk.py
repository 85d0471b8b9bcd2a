"""What a run has left in its state directory."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path


def last_checkpoint(directory: Path) -> tuple[int, str]:
    """Returns step and digest of the newest committed checkpoint below `directory`/state."""
    with closing(sqlite3.connect(directory / "state" / "journal.sqlite3")) as journal:
        query = "SELECT global_step, digest FROM checkpoints WHERE state = 'committed' ORDER BY at_ns DESC"
        step, digest = journal.execute(query).fetchone()
    return step, digest
