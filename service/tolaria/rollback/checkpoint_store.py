"""All durable checkpoints of a state directory: writing, committing, retention, loading the newest that is whole.

Owns the directory and the journal's `checkpoints` and `faults`. A checkpoint counts once its row is committed;
directory and journal are brought to agree at every start. Must not know threads, nor deadlines beyond `expired`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tolaria.errors import (
    CheckpointDamagedError,
    CheckpointUnreadableError,
    CheckpointWriteError,
    JournalError,
    NoCheckpointError,
)
from tolaria.rollback.checkpoint import (
    TEMPORARY_PREFIX,
    errno_name,
    manifest_of,
    read_checkpoint,
    read_manifest,
    write_checkpoint,
)
from tolaria.rollback.filesystem import Filesystem, remove_quietly
from tolaria.rollback.journal_rows import CheckpointRow, CheckpointState, FaultRow
from tolaria.rollback.retention import Retention, kept_of_all

if TYPE_CHECKING:
    from pathlib import Path

    from tolaria.rollback.journal import Journal
    from tolaria.rollback.manifest import Manifest
    from tolaria.rollback.state import StateImage

UNRECORDED_FAULTS_MAX = 100
"""Faults that wait for the journal; the oldest give way."""

CHECKPOINTS = "checkpoints"
QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class Damage:
    """A checkpoint that could not be loaded. `quarantined`: it was set aside; else the system refused to read it."""

    checkpoint_id: str
    global_step: int
    stage: str
    reason: str
    quarantined: bool


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A verified checkpoint, and those that were tried in vain before it."""

    row: CheckpointRow
    image: StateImage
    damaged: tuple[Damage, ...]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a start had to put right: whole checkpoints without a row, rows without a checkpoint, leftovers."""

    adopted: tuple[str, ...]
    missing: tuple[str, ...]
    removed: tuple[str, ...]


class CheckpointStore:
    """The checkpoints under `directory`, which is made if need be. Call `recover` once before anything else.

    Several runs may share the directory. What is listed, loaded and superseded is `run_id`'s alone; of the others only
    `recover` and retention know. `write` is for one thread at a time, usually the checkpoint writer's; loading may be
    done by another meanwhile.
    """

    def __init__(
        self, directory: Path, journal: Journal, *, run_id: str, retention: Retention, files: Filesystem | None = None
    ) -> None:
        self._files = files or Filesystem()
        self._journal = journal
        self._run_id = run_id
        self._retention = retention
        self._last_fault: FaultRow | None = None
        self._unrecorded: deque[FaultRow] = deque(maxlen=UNRECORDED_FAULTS_MAX)
        self._removal = threading.Lock()  # nothing is removed while it is being read
        self._directory = directory
        self._checkpoints = directory / CHECKPOINTS
        self._quarantine = directory / QUARANTINE
        for place in (directory, self._checkpoints, self._quarantine):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)

    def for_run(self, run_id: str) -> CheckpointStore:
        """The same checkpoints as another run sees them, in place of this object."""
        return CheckpointStore(
            self._directory, self._journal, run_id=run_id, retention=self._retention, files=self._files
        )

    def recover(self) -> Recovery:
        """Bring directory and journal to agree after a crash or a lost journal.

        Leftovers of unfinished writes are removed. A whole directory without a row was finished but for its commit, or
        the journal was lost: it is adopted. A row without a directory is marked missing.
        """
        known = {row.checkpoint_id: row for row in self._journal.rows(CheckpointRow)}
        adopted, removed = [], []
        present = set(self._files.names(self._checkpoints))
        for name in sorted(present):
            row = known.get(name)
            if name.startswith(TEMPORARY_PREFIX) or (row is not None and row.state == "pruned"):
                remove_quietly(self._files, self._checkpoints / name)
                removed.append(name)
            elif row is None and self._adopt(name):
                adopted.append(name)
        lost = [row for row in known.values() if row.checkpoint_id not in present]
        missing = [row for row in lost if row.state in {"committed", "superseded"}]
        for row in missing:
            self._mark(row, "missing", "its directory is gone")
        return Recovery(tuple(adopted), tuple(row.checkpoint_id for row in missing), tuple(removed))

    def write(self, image: StateImage, *, metric: float | None = None) -> CheckpointRow:
        """Write the image durably, commit it in the journal, then apply retention.

        Args:
            image: stays as it is meanwhile (lease it); sealed here if it is not.
            metric: decides which checkpoint is best; NaN and None never are.

        Raises:
            CheckpointWriteError: it is not committed; earlier ones are as they were. The cause is a fault in the
                journal, at once or as soon as the journal can be written again.
        """
        try:
            manifest = self._manifest(image, metric)
            self._make_places()
            place = write_checkpoint(self._files, self._checkpoints, manifest, image)
            row = self._commit(manifest, place)
        except CheckpointWriteError as error:
            self._fault("checkpoint_failed", image.position.global_step, error.stage, str(error))
            raise
        self._last_fault = None
        self._prune()
        self._record_faults()
        return row

    def restore_points(self) -> tuple[CheckpointRow, ...]:
        """The run's committed checkpoints, oldest first."""
        rows = self._journal.checkpoints(run_id=self._run_id)
        return tuple(row for row in rows if row.state == "committed")

    def load_newest(self, expired: Callable[[], bool], *, at_or_before: int | None = None) -> LoadedCheckpoint:
        """The run's newest committed checkpoint that is whole; of those at or before a step the one with the highest.

        Damaged ones are moved to the quarantine and the next older one is tried; so are those that the system refuses
        to read, which stay where they are.

        Raises:
            NoCheckpointError: none can be loaded.
            RestoreAbandonedError: `expired` said so.
        """
        rows = list(self.restore_points())
        if at_or_before is not None:
            rows = sorted((r for r in rows if r.global_step <= at_or_before), key=lambda r: (r.global_step, r.at_ns))
        damaged: list[Damage] = []
        with self._removal:
            for row in reversed(rows):
                found = self._load(row, expired)
                if not isinstance(found, Damage):
                    return LoadedCheckpoint(row, found, tuple(damaged))
                damaged.append(found)
        tried = "".join(f"; {d.checkpoint_id}: {d.stage}, {d.reason}" for d in damaged)
        wanted = "" if at_or_before is None else f" at or before step {at_or_before}"
        raise NoCheckpointError(f"there is no whole checkpoint{wanted}{tried}")

    def verify(self, row: CheckpointRow, expired: Callable[[], bool]) -> Damage | None:
        """Read a checkpoint and check every digest; nothing is moved or marked."""
        try:
            self._read(row, expired)
        except (CheckpointDamagedError, CheckpointUnreadableError) as error:
            return Damage(row.checkpoint_id, row.global_step, error.stage, error.reason, quarantined=False)
        return None

    def supersede_after(self, global_step: int) -> int:
        """After a rollback to `global_step`: later checkpoints are not resumed from any more; returns how many."""
        later = [row for row in self.restore_points() if row.global_step > global_step]
        for row in later:
            self._mark(row, "superseded", f"rolled back to step {global_step}")
        return len(later)

    def _manifest(self, image: StateImage, metric: float | None) -> Manifest:
        try:
            created_at_ns = self._next_time_ns()
        except JournalError as error:
            raise CheckpointWriteError("journal", "journal", str(error)) from error
        return manifest_of(
            image,
            checkpoint_id=f"{image.position.global_step:012d}-{uuid.uuid4().hex[:8]}",
            run_id=self._run_id,
            created_at_ns=created_at_ns,
            metric=metric if metric is not None and math.isfinite(metric) else None,
        )

    def _make_places(self) -> None:
        """They were made at the start; somebody may have removed them since."""
        try:
            for place in (self._checkpoints, self._quarantine):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointWriteError("create", errno_name(error), str(error)) from error

    def _commit(self, manifest: Manifest, place: Path) -> CheckpointRow:
        row = _row_of(manifest)
        try:
            self._journal.put(row)
        except JournalError as error:
            remove_quietly(self._files, place)
            raise CheckpointWriteError("journal", "journal", str(error)) from error
        return row

    def _adopt(self, name: str) -> bool:
        place = self._checkpoints / name
        try:
            manifest = read_manifest(self._files, place)
        except CheckpointDamagedError as error:
            self._set_aside(place)
            self._fault("checkpoint_damaged", -1, error.stage, str(error))
            return False
        except CheckpointUnreadableError as error:
            self._fault("checkpoint_unreadable", -1, error.stage, str(error))
            return False
        self._journal.put(_row_of(manifest))
        return True

    def _load(self, row: CheckpointRow, expired: Callable[[], bool]) -> StateImage | Damage:
        try:
            return self._read(row, expired)
        except CheckpointUnreadableError as error:
            self._fault("checkpoint_unreadable", row.global_step, error.stage, str(error))
            return Damage(row.checkpoint_id, row.global_step, error.stage, error.reason, quarantined=False)
        except CheckpointDamagedError as error:
            self._set_aside(self._checkpoints / row.checkpoint_id)
            self._mark_if_possible(row, "quarantined", f"{error.stage}: {error.reason}")
            self._fault("checkpoint_damaged", row.global_step, error.stage, str(error))
            return Damage(row.checkpoint_id, row.global_step, error.stage, error.reason, quarantined=True)

    def _read(self, row: CheckpointRow, expired: Callable[[], bool]) -> StateImage:
        manifest, image = read_checkpoint(self._files, self._checkpoints / row.checkpoint_id, expired)
        if manifest.fingerprint.total != row.digest:
            raise CheckpointDamagedError(row.checkpoint_id, "manifest", "digest")
        return image

    def _prune(self) -> None:
        """Row first, then the bytes: a crash in between leaves nothing that looks committed and is not."""
        try:
            with self._removal:
                for row in self._doomed():
                    self._mark(row, "pruned", "retention")
                    remove_quietly(self._files, self._checkpoints / row.checkpoint_id)
        except JournalError as error:  # the new checkpoint is committed all the same; the next one prunes
            self._fault("retention_failed", -1, "journal", str(error))

    def _doomed(self) -> list[CheckpointRow]:
        rows = self._journal.checkpoints()
        committed = [row for row in rows if row.state == "committed"]
        kept = kept_of_all(committed, self._retention, run_id=self._run_id)
        return [*(r for r in rows if r.state == "superseded"), *(r for r in committed if r not in kept)]

    def _set_aside(self, place: Path) -> None:
        try:
            self._files.rename(place, self._quarantine / f"{place.name}-{uuid.uuid4().hex[:8]}")
            self._files.sync_directory(self._quarantine)
            self._files.sync_directory(self._checkpoints)
        except OSError as error:
            self._fault("quarantine_failed", -1, "rename", str(error))

    def _mark(self, row: CheckpointRow, state: CheckpointState, detail: str) -> None:
        self._journal.put(replace(row, state=state, detail=detail))

    def _mark_if_possible(self, row: CheckpointRow, state: CheckpointState, detail: str) -> None:
        """Without its row marked it is found damaged once more at the next look, which costs no more than that."""
        with contextlib.suppress(JournalError):
            self._mark(row, state, detail)

    def _fault(self, kind: str, global_step: int, stage: str, reason: str) -> None:
        """The same fault over and over, as of a disk that stays full, is one row: when it began."""
        told = (kind, stage, reason)
        if self._last_fault is None or told != (self._last_fault.kind, self._last_fault.stage, self._last_fault.reason):
            self._last_fault = FaultRow(
                uuid.uuid4().hex, time.time_ns(), self._run_id, kind, global_step, stage, reason
            )
            self._unrecorded.append(self._last_fault)
        self._record_faults()

    def _record_faults(self) -> None:
        """Write down the faults there are; with a journal that cannot be written they wait for the next occasion."""
        with contextlib.suppress(JournalError):
            while self._unrecorded:
                self._journal.put(self._unrecorded[0])
                self._unrecorded.popleft()

    def _next_time_ns(self) -> int:
        """Now, but after every checkpoint there is: the newest must stay the newest when the clock is set back."""
        return max([time.time_ns(), *(row.at_ns + 1 for row in self._journal.checkpoints())])


def _row_of(manifest: Manifest) -> CheckpointRow:
    return CheckpointRow(
        checkpoint_id=manifest.checkpoint_id,
        at_ns=manifest.created_at_ns,
        run_id=manifest.run_id,
        global_step=manifest.position.global_step,
        epoch=manifest.position.epoch,
        size_bytes=manifest.tensor_bytes + manifest.values_bytes,
        digest=manifest.fingerprint.total,
        metric=manifest.metric,
    )
