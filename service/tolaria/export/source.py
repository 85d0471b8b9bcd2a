"""The checkpoint that an export is made of: chosen in a state directory, read and verified without a service."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from tolaria.checkpoint.directory import CHECKPOINTS, JOURNAL, RUN_SETTINGS, SETTINGS
from tolaria.checkpoint.format import Manifest, read_checkpoint
from tolaria.checkpoint.store import Retention
from tolaria.errors import CheckpointDamagedError, NoCheckpointError
from tolaria.filesystem import Filesystem
from tolaria.images import StateImage
from tolaria.journal.reader import read_journal
from tolaria.journal.rows import CheckpointRow

NEWEST: Final = "newest"
BEST: Final = "best"
_TRIES: Final = 5


@dataclass(frozen=True, slots=True)
class Source:
    """A verified checkpoint, and the settings of its run as far as they are known, by section and field."""

    manifest: Manifest
    image: StateImage
    settings: Mapping[str, Mapping[str, Any]]

    @property
    def values(self) -> dict[str, Any]:
        """Everything in the state that is not a tensor."""
        return cast("dict[str, Any]", json.loads(self.image.values))


def read_source(directory: Path, which: str) -> Source:
    """Reads a checkpoint, also while a service uses the directory, in which nothing changes.

    Args:
        directory: a state directory.
        which: a checkpoint's id, also of a superseded one; `newest`: the newest one of the newest run that is not
            suspect; `best`: the one with the best metric of that run.

    Raises:
        NoCheckpointError: there is none such.
        CheckpointDamagedError: it differs from what was written.
        CheckpointUnreadableError, JournalError: the system cannot read it.
    """
    path = directory / JOURNAL
    for _ in range(_TRIES):
        row = choose(read_journal(path, CheckpointRow), which, direction=best_direction(directory))
        try:
            return _read(directory, row)
        except CheckpointDamagedError:
            # Retention removes checkpoints at any time; one that is still listed is damaged.
            rows = read_journal(path, CheckpointRow)
            if any(now.checkpoint_id == row.checkpoint_id and _kept(now) for now in rows):
                raise
    raise NoCheckpointError(
        "the service removes checkpoints faster than one can be read: pause the run, or raise checkpoint.keep_last"
    )


def choose(rows: Sequence[CheckpointRow], which: str, *, direction: str) -> CheckpointRow:
    """Returns the row of a checkpoint, of all rows, oldest first. Raises NoCheckpointError."""
    kept = [row for row in rows if _kept(row)]
    if which not in {NEWEST, BEST}:
        found = next((row for row in kept if row.checkpoint_id == which), None)
        if found is None:
            gone = next((row for row in rows if row.checkpoint_id == which), None)
            why = "tolaria restore-points lists them" if gone is None else f"it was {gone.state}: {gone.detail}"
            raise NoCheckpointError(f"there is no checkpoint {which}; {why}")
        return found
    committed = [row for row in kept if row.state == "committed"]
    if not committed:
        raise NoCheckpointError("there is no checkpoint yet")
    own = [row for row in committed if row.run_id == committed[-1].run_id]
    if which == NEWEST:
        return next((row for row in reversed(own) if not row.doubtful), own[-1])
    best = Retention(1, "highest" if direction == "max" else "lowest").best_of(own)
    if best is None:
        raise NoCheckpointError("no checkpoint has a metric, so that none is the best; name one, or take the newest")
    return best


def best_direction(directory: Path) -> str:
    """Returns `max` or `min`: whether the greatest or the lowest metric of this directory's run is the best."""
    best = str(_recorded(directory, None).get("checkpoint", {}).get("best", "accuracy"))
    if best in {"accuracy", "loss"}:
        return "max" if best == "accuracy" else "min"
    return best.rpartition(":")[2]


def _kept(row: CheckpointRow) -> bool:
    return row.state in {"committed", "superseded"}


def _read(directory: Path, row: CheckpointRow) -> Source:
    manifest, image = read_checkpoint(Filesystem(), directory / CHECKPOINTS / row.checkpoint_id)
    if manifest.fingerprint.total != row.digest:
        raise CheckpointDamagedError(row.checkpoint_id, "manifest", "another digest than the journal's")
    return Source(manifest, image, _recorded(directory, manifest.run_id))


def _recorded(directory: Path, run_id: str | None) -> dict[str, dict[str, Any]]:
    """Returns the recorded settings of a run, or of the newest; nothing if there are none or they cannot be read."""
    own = directory / RUN_SETTINGS / f"{run_id}.json"
    try:
        record = json.loads((own if run_id and own.is_file() else directory / SETTINGS).read_text(encoding="utf-8"))
        known = record["settings"] if run_id in {None, record["run_id"]} else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: section for name, section in known.items() if isinstance(section, dict)}
