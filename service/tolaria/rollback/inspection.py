"""Looking at a state directory without touching it: is what it keeps what was written? A service may be using it.

Owns what counts as damage there. Nothing is repaired, set aside or marked: that is a start's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from tolaria.errors import CheckpointDamagedError, CheckpointUnreadableError, JournalDamagedError
from tolaria.rollback.checkpoint import TEMPORARY_PREFIX, read_checkpoint
from tolaria.rollback.checkpoint_store import CHECKPOINTS
from tolaria.rollback.filesystem import Filesystem
from tolaria.rollback.journal_reading import read_journal
from tolaria.rollback.journal_rows import CheckpointRow
from tolaria.rollback.restore import never
from tolaria.rollback.storage import JOURNAL

if TYPE_CHECKING:
    from pathlib import Path

    from tolaria.rollback.manifest import Manifest

JOURNAL_FINDING: Final = "journal"


class Condition(StrEnum):
    """What was found of one thing. `gone`: retention removed it meanwhile; `unknown`: the journal does not name it."""

    WHOLE = "whole"
    DAMAGED = "damaged"
    UNREADABLE = "unreadable"
    GONE = "gone"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """The journal, or one entry of the checkpoints' directory, which may have any name; `detail` says more."""

    name: str
    condition: Condition
    detail: str

    @property
    def bad(self) -> bool:
        """Whether something that was committed is not there as it was written."""
        return self.condition in {Condition.DAMAGED, Condition.UNREADABLE}


def inspect_storage(directory: Path) -> Iterator[Finding]:
    """The journal, then every committed checkpoint as soon as it has been read, then what the journal does not know.

    With a damaged journal nobody knows what was committed: every entry is taken for a checkpoint then. One checkpoint
    at a time is in memory, whole.

    Raises:
        JournalNewerError: a newer Tolaria wrote the journal.
        JournalUnavailableError: there is no journal, or the system refused to read it.
        OSError: the checkpoints' directory cannot be listed.
    """
    # Before the rows: what is renamed into place after this gets its row after this too.
    names = _names(directory / CHECKPOINTS)
    try:
        rows = read_journal(directory / JOURNAL, CheckpointRow)
    except JournalDamagedError as error:
        yield Finding(JOURNAL_FINDING, Condition.DAMAGED, str(error))
        yield from (_read(directory, name, None) for name in names if not name.startswith(TEMPORARY_PREFIX))
        return
    committed = [row for row in rows if row.state == "committed"]
    yield Finding(JOURNAL_FINDING, Condition.WHOLE, f"{len(committed)} committed checkpoints")
    yield from (_looked_at(directory, row) for row in committed)
    known = {row.checkpoint_id for row in rows}
    yield from (_stranger(name) for name in names if name not in known)


def _looked_at(directory: Path, row: CheckpointRow) -> Finding:
    finding = _read(directory, row.checkpoint_id, row)
    if not finding.bad:
        return finding
    rows = read_journal(directory / JOURNAL, CheckpointRow)
    state = next((now.state for now in rows if now.checkpoint_id == row.checkpoint_id), "missing")
    if state in {"pruned", "superseded"}:
        return Finding(row.checkpoint_id, Condition.GONE, f"it was {state} meanwhile")
    return finding


def _read(directory: Path, name: str, row: CheckpointRow | None) -> Finding:
    try:
        manifest, _ = read_checkpoint(Filesystem(), directory / CHECKPOINTS / name, never)
    except CheckpointDamagedError as error:
        return Finding(name, Condition.DAMAGED, f"{error.stage}: {error.reason}")
    except CheckpointUnreadableError as error:
        return Finding(name, Condition.UNREADABLE, f"{error.stage}: {error.reason}")
    if row is not None and row.digest != manifest.fingerprint.total:
        return Finding(name, Condition.DAMAGED, "manifest: another digest than the journal's")
    return Finding(name, Condition.WHOLE, _described(manifest))


def _described(manifest: Manifest) -> str:
    position, digest = manifest.position, manifest.fingerprint.total
    size_bytes = manifest.tensor_bytes + manifest.values_bytes
    return f"step {position.global_step}, epoch {position.epoch}, {size_bytes} bytes, digest {digest}"


def _stranger(name: str) -> Finding:
    if name.startswith(TEMPORARY_PREFIX):
        return Finding(name, Condition.UNKNOWN, "being written, or left by a crash")
    return Finding(name, Condition.UNKNOWN, "the journal names no such checkpoint; the next start looks at it")


def _names(checkpoints: Path) -> list[str]:
    try:
        return Filesystem().names(checkpoints)
    except FileNotFoundError:
        return []
