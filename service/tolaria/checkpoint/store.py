"""The durable checkpoints of a state directory: writing, committing, retention, and loading the newest intact one."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from tolaria.checkpoint.format import (
    TEMPORARY_PREFIX,
    Manifest,
    read_checkpoint,
    read_manifest,
    write_checkpoint,
    write_errors,
)
from tolaria.errors import (
    CheckpointDamagedError,
    CheckpointUnreadableError,
    CheckpointWriteError,
    JournalError,
    NoCheckpointError,
)
from tolaria.filesystem import Filesystem, remove_quietly
from tolaria.journal.rows import CheckpointRow, CheckpointState, FaultRow

if TYPE_CHECKING:
    from pathlib import Path

    from tolaria.images import StateImage
    from tolaria.journal.database import Journal

CHECKPOINTS: Final = "checkpoints"
QUARANTINE: Final = "quarantine"

_UNRECORDED_FAULTS_MAX: Final = 100
"""Maximum number of faults kept while the journal fails; the oldest are dropped."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How many checkpoints are kept: of this run the newest `last` and the best by metric.

    Of the newest `other_runs` runs in the same directory the newest and the best checkpoint are kept, so that a new
    run does not remove an earlier run's result, and a directory in use for years does not fill up.
    """

    last: int
    best: Literal["highest", "lowest"]
    other_runs: int = 3

    def kept(self, rows: Sequence[CheckpointRow], *, run_id: str) -> set[CheckpointRow]:
        """Selects what to keep of all runs' committed rows, oldest first, while `run_id` is the active run."""
        by_run: dict[str, list[CheckpointRow]] = {run_id: []}
        for row in reversed(rows):  # the run with the newest row comes first
            by_run.setdefault(row.run_id, []).append(row)
        kept = self._newest_and_best(by_run.pop(run_id), self.last)
        for others in list(by_run.values())[: self.other_runs]:
            kept |= self._newest_and_best(others, 1)
        return kept

    def _newest_and_best(self, newest_first: list[CheckpointRow], last: int) -> set[CheckpointRow]:
        """Selects from one run's rows. Of equally good rows the newest is the best; rows without a metric never are."""
        sign = 1.0 if self.best == "highest" else -1.0
        rated = [(sign * row.metric, row.at_ns, row) for row in newest_first if row.metric is not None]
        best = [max(rated, key=lambda entry: entry[:2])[2]] if rated else []
        return {*newest_first[:last], *best}


@dataclass(frozen=True, slots=True)
class Damage:
    """A checkpoint that could not be loaded. `quarantined`: it was moved away; otherwise it cannot be read."""

    checkpoint_id: str
    stage: str
    reason: str
    quarantined: bool


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A verified checkpoint, and the newer ones that could not be loaded."""

    row: CheckpointRow
    image: StateImage
    damaged: tuple[Damage, ...]


@dataclass(frozen=True, slots=True)
class Repairs:
    """Ids of intact checkpoints that were not in the journal, of rows without a directory, and of removed leftovers."""

    adopted: tuple[str, ...]
    missing: tuple[str, ...]
    removed: tuple[str, ...]


class CheckpointStore:
    """The checkpoints in a state directory, which is created if missing. Call `repair` once before anything else.

    A checkpoint exists once its row in the journal is committed. Several runs may share the directory: listing,
    loading and superseding affect `run_id` only. `write` must be called from one thread at a time, usually the
    checkpoint writer's; another thread may load meanwhile.
    """

    def __init__(
        self, directory: Path, journal: Journal, *, run_id: str, retention: Retention, files: Filesystem | None = None
    ) -> None:
        self._files = files or Filesystem()
        self._journal = journal
        self._run_id = run_id
        self._retention = retention
        self._last_fault: FaultRow | None = None
        self._unrecorded: deque[FaultRow] = deque(maxlen=_UNRECORDED_FAULTS_MAX)
        self._removal = threading.Lock()  # nothing is removed while it is being read
        self._directory = directory
        self._checkpoints = directory / CHECKPOINTS
        self._quarantine = directory / QUARANTINE
        self._make_directories()

    def for_run(self, run_id: str) -> CheckpointStore:
        """Returns a store of the same directory for another run, to use instead of this one."""
        return CheckpointStore(
            self._directory, self._journal, run_id=run_id, retention=self._retention, files=self._files
        )

    def repair(self) -> Repairs:
        """Makes directory and journal agree after a crash or the loss of the journal.

        Removes leftovers of unfinished writes, adopts intact checkpoints without a row, and marks rows without a
        directory as missing.
        """
        known = {row.checkpoint_id: row for row in self._journal.rows(CheckpointRow)}
        adopted, removed = [], []
        present = self._files.names(self._checkpoints)
        for name in present:
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
        return Repairs(tuple(adopted), tuple(row.checkpoint_id for row in missing), tuple(removed))

    def write(self, image: StateImage, *, metric: float | None = None) -> CheckpointRow:
        """Writes the image durably, commits it in the journal and applies retention.

        Args:
            image: must not change meanwhile (lease it). Sealed here if it is not.
            metric: decides which checkpoint is best; NaN and None never are.

        Raises:
            CheckpointWriteError: the checkpoint is not committed; earlier ones are unchanged. The cause is recorded as
                a fault in the journal, as soon as the journal can be written.
        """
        try:
            row = self._commit(image, metric)
        except CheckpointWriteError as error:
            self._fault("checkpoint_failed", image.position.global_step, error.stage, str(error))
            raise
        self._last_fault = None
        self._prune()
        self._record_faults()
        return row

    def restore_points(self) -> tuple[CheckpointRow, ...]:
        """Returns the run's committed checkpoints, oldest first."""
        return self._journal.restore_points(self._run_id)

    def supersede_after(self, global_step: int) -> None:
        """Marks later checkpoints as superseded after a rollback to `global_step`."""
        self._journal.supersede_after(self._run_id, global_step)

    def load_newest(
        self, expired: Callable[[], bool] | None = None, *, at_or_before: int | None = None
    ) -> LoadedCheckpoint:
        """Loads the run's newest intact checkpoint, or that with the highest step at or before a step.

        Moves damaged checkpoints to the quarantine and tries the next older one. Checkpoints that the system cannot
        read are skipped and stay in place.

        Raises:
            NoCheckpointError: none can be loaded.
            RestoreAbandonedError: `expired`, called before each megabyte, returned True.
        """
        rows = list(self.restore_points())
        if at_or_before is not None:
            rows = sorted((r for r in rows if r.global_step <= at_or_before), key=lambda r: (r.global_step, r.at_ns))
        damaged: list[Damage] = []
        with self._removal:
            for row in reversed(rows):
                try:
                    return LoadedCheckpoint(row, self._read(row, expired), tuple(damaged))
                except (CheckpointDamagedError, CheckpointUnreadableError) as error:
                    quarantined = self._set_aside(row.checkpoint_id, error, row)
                    damaged.append(Damage(row.checkpoint_id, error.stage, error.reason, quarantined))
        tried = "".join(f"; {d.checkpoint_id}: {d.stage}, {d.reason}" for d in damaged)
        wanted = "" if at_or_before is None else f" at or before step {at_or_before}"
        raise NoCheckpointError(f"there is no intact checkpoint{wanted}{tried}")

    def _make_directories(self) -> None:
        for place in (self._directory, self._checkpoints, self._quarantine):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _commit(self, image: StateImage, metric: float | None) -> CheckpointRow:
        with _journal_errors():
            # Later than every other one: the newest must stay the newest when the clock is set back.
            created_at_ns = max([time.time_ns(), *(row.at_ns + 1 for row in self._journal.checkpoints())])
        manifest = Manifest.of(
            image,
            checkpoint_id=f"{image.position.global_step:012d}-{uuid.uuid4().hex[:8]}",
            run_id=self._run_id,
            created_at_ns=created_at_ns,
            metric=metric if metric is not None and math.isfinite(metric) else None,
        )
        with write_errors("create"):  # the directories may have been removed since the start
            self._make_directories()
        place = write_checkpoint(self._files, self._checkpoints, manifest, image)
        row = manifest.row()
        try:
            with _journal_errors():
                self._journal.put(row)
        except CheckpointWriteError:
            remove_quietly(self._files, place)
            raise
        return row

    def _adopt(self, name: str) -> bool:
        try:
            manifest = read_manifest(self._files, self._checkpoints / name)
        except (CheckpointDamagedError, CheckpointUnreadableError) as error:
            self._set_aside(name, error, None)
            return False
        self._journal.put(manifest.row())
        return True

    def _read(self, row: CheckpointRow, expired: Callable[[], bool] | None) -> StateImage:
        manifest, image = read_checkpoint(self._files, self._checkpoints / row.checkpoint_id, expired)
        if manifest.fingerprint.total != row.digest:
            raise CheckpointDamagedError(row.checkpoint_id, "manifest", "digest")
        return image

    def _set_aside(
        self, name: str, error: CheckpointDamagedError | CheckpointUnreadableError, row: CheckpointRow | None
    ) -> bool:
        """Records the fault, moves a damaged checkpoint to the quarantine, and returns whether it is damaged."""
        damaged = isinstance(error, CheckpointDamagedError)
        if damaged:
            self._move_to_quarantine(name)
        if damaged and row is not None:
            with contextlib.suppress(JournalError):  # without the mark, the next load finds it missing
                self._mark(row, "quarantined", f"{error.stage}: {error.reason}")
        kind = "checkpoint_damaged" if damaged else "checkpoint_unreadable"
        self._fault(kind, -1 if row is None else row.global_step, error.stage, str(error))
        return damaged

    def _move_to_quarantine(self, name: str) -> None:
        try:
            self._files.rename(self._checkpoints / name, self._quarantine / f"{name}-{uuid.uuid4().hex[:8]}")
            self._files.sync_directory(self._quarantine)
            self._files.sync_directory(self._checkpoints)
        except OSError as error:
            self._fault("quarantine_failed", -1, "rename", str(error))

    def _prune(self) -> None:
        """Marks the row first, then removes the files: a crash in between leaves no row committed without its files."""
        try:
            with self._removal:
                rows = self._journal.checkpoints()
                committed = [row for row in rows if row.state == "committed"]
                kept = self._retention.kept(committed, run_id=self._run_id)
                superseded = [row for row in rows if row.state == "superseded"]
                for row in [*superseded, *(row for row in committed if row not in kept)]:
                    self._mark(row, "pruned", "retention")
                    remove_quietly(self._files, self._checkpoints / row.checkpoint_id)
        except JournalError as error:  # the new checkpoint is committed; writing the next one prunes again
            self._fault("retention_failed", -1, "journal", str(error))

    def _mark(self, row: CheckpointRow, state: CheckpointState, detail: str) -> None:
        self._journal.put(replace(row, state=state, detail=detail))

    def _fault(self, kind: str, global_step: int, stage: str, reason: str) -> None:
        """Records a fault. Repetitions, such as on a disk that stays full, share a row with the time of the first."""
        last = self._last_fault
        if last is None or (kind, stage, reason) != (last.kind, last.stage, last.reason):
            self._last_fault = FaultRow(
                uuid.uuid4().hex, time.time_ns(), self._run_id, kind, global_step, stage, reason
            )
            self._unrecorded.append(self._last_fault)
        self._record_faults()

    def _record_faults(self) -> None:
        """Writes the waiting faults; those that the journal refuses wait for the next call."""
        with contextlib.suppress(JournalError):
            while self._unrecorded:
                self._journal.put(self._unrecorded[0])
                self._unrecorded.popleft()


@contextlib.contextmanager
def _journal_errors() -> Iterator[None]:
    try:
        yield
    except JournalError as error:
        raise CheckpointWriteError("journal", "journal", str(error)) from error
