"""Read-only verification of a state directory, also while a service uses it. Repairs, moves and marks nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from tolaria.checkpoint.directory import CHECKPOINTS, JOURNAL
from tolaria.checkpoint.format import TEMPORARY_PREFIX, read_checkpoint
from tolaria.errors import CheckpointDamagedError, CheckpointUnreadableError, JournalDamagedError
from tolaria.filesystem import Filesystem
from tolaria.journal.reader import read_journal
from tolaria.journal.rows import CheckpointRow

if TYPE_CHECKING:
    from pathlib import Path


class Condition(StrEnum):
    """The condition of one item. `gone`: retention removed it meanwhile; `unknown`: the journal does not list it."""

    WHOLE = "whole"
    DAMAGED = "damaged"
    UNREADABLE = "unreadable"
    GONE = "gone"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """The condition of the journal or of one entry in the checkpoints' directory; an entry may have any name."""

    name: str
    condition: Condition
    detail: str

    @property
    def bad(self) -> bool:
        """Whether committed data is missing or differs from what was written."""
        return self.condition in {Condition.DAMAGED, Condition.UNREADABLE}


def inspect_storage(directory: Path) -> Iterator[Finding]:
    """Yields a finding for the journal, for each committed checkpoint once it is read, and for unlisted entries.

    If the journal is damaged, every entry is treated as a committed checkpoint. Holds one checkpoint in memory at a
    time.

    Raises:
        JournalNewerError: a newer Tolaria wrote the journal.
        JournalUnavailableError: there is no journal, or it cannot be read.
        OSError: the checkpoints' directory cannot be listed.
    """
    # Listed before the rows are read: a checkpoint that is renamed into place later also gets its row later.
    names: list[str] = []
    with suppress(FileNotFoundError):
        names = Filesystem().names(directory / CHECKPOINTS)
    try:
        rows = read_journal(directory / JOURNAL, CheckpointRow)
    except JournalDamagedError as error:
        yield Finding("journal", Condition.DAMAGED, str(error))
        yield from (_read(directory, name, None) for name in names if not name.startswith(TEMPORARY_PREFIX))
        return
    committed = [row for row in rows if row.state == "committed"]
    superseded = [row for row in rows if row.state == "superseded"]  # kept, so that a rollback can be undone
    yield Finding("journal", Condition.WHOLE, f"{len(committed)} committed checkpoints")
    yield from (_committed(directory, row) for row in (*committed, *superseded))
    for name in sorted(set(names) - {row.checkpoint_id for row in rows}):
        detail = "the journal names no such checkpoint; the next start looks at it"
        if name.startswith(TEMPORARY_PREFIX):
            detail = "being written, or left by a crash"
        yield Finding(name, Condition.UNKNOWN, detail)


def _committed(directory: Path, row: CheckpointRow) -> Finding:
    finding = _read(directory, row.checkpoint_id, row)
    if finding.bad:  # unless retention or a rollback removed it since the rows were read
        rows = read_journal(directory / JOURNAL, CheckpointRow)
        state = next((now.state for now in rows if now.checkpoint_id == row.checkpoint_id), "missing")
        if state in {"pruned", "superseded"}:
            return Finding(row.checkpoint_id, Condition.GONE, f"it was {state} meanwhile")
    return finding


def _read(directory: Path, name: str, row: CheckpointRow | None) -> Finding:
    try:
        manifest, _ = read_checkpoint(Filesystem(), directory / CHECKPOINTS / name)
    except (CheckpointDamagedError, CheckpointUnreadableError) as error:
        damaged = isinstance(error, CheckpointDamagedError)
        condition = Condition.DAMAGED if damaged else Condition.UNREADABLE
        return Finding(name, condition, f"{error.stage}: {error.reason}")
    position, digest = manifest.position, manifest.fingerprint.total
    if row is not None and row.digest != digest:
        return Finding(name, Condition.DAMAGED, "manifest: another digest than the journal's")
    detail = f"step {position.global_step}, epoch {position.epoch}, {manifest.size_bytes} bytes, digest {digest}"
    return Finding(name, Condition.WHOLE, detail)
