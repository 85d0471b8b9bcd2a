"""The durable checkpoints of a state directory: writing, committing, retention, and loading the newest intact one."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from tolaria.checkpoint.directory import CHECKPOINTS, QUARANTINE
from tolaria.checkpoint.format import (
    TEMPORARY_PREFIX,
    Manifest,
    Provenance,
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
from tolaria.journal.rows import CheckpointRow, CheckpointState, FaultRow, RollbackRow

if TYPE_CHECKING:
    from pathlib import Path

    from tolaria.images import StateImage
    from tolaria.journal.database import Journal
    from tolaria.values.lineage import Lineage

_NO_SPACE: Final = frozenset({"ENOSPC", "EDQUOT"})

_UNRECORDED_FAULTS_MAX: Final = 100
"""Maximum number of faults kept while the journal fails; the oldest are dropped."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints are kept: of this run the newest `last`, the best by metric and the newest proven one.

    Of the superseded ones the newest `superseded` are kept, each for `superseded_s` seconds. Of the newest `other_runs`
    runs in the same directory the newest and the best checkpoint are kept, so that a new run does not remove an earlier
    run's result, and a directory in use for years does not fill up.
    """

    last: int
    best: Literal["highest", "lowest"]
    other_runs: int = 3
    superseded: int = 0
    superseded_s: float = 0.0

    def kept(self, rows: Sequence[CheckpointRow], *, run_id: str) -> set[CheckpointRow]:
        """Selects what to keep of all runs' committed rows, oldest first, while `run_id` is the active run."""
        by_run: dict[str, list[CheckpointRow]] = {run_id: []}
        for row in reversed(rows):  # the run with the newest row comes first
            by_run.setdefault(row.run_id, []).append(row)
        own = by_run.pop(run_id)
        kept = self._newest_and_best(own, self.last) | set([row for row in own if row.proven][:1])
        for others in list(by_run.values())[: self.other_runs]:
            kept |= self._newest_and_best(others, 1)
        return kept

    def kept_superseded(self, rows: Sequence[CheckpointRow], *, run_id: str, now_ns: int) -> set[CheckpointRow]:
        """Selects what to keep of all runs' superseded rows: those of the latest rollbacks, and of these the newest."""

        def superseded_ns(row: CheckpointRow) -> int:
            return row.at_ns if row.superseded_at_ns is None else row.superseded_at_ns

        own = [row for row in rows if row.run_id == run_id and now_ns - superseded_ns(row) < self.superseded_s * 1e9]
        own.sort(key=lambda row: (superseded_ns(row), row.at_ns), reverse=True)
        return set(own[: self.superseded])

    def _newest_and_best(self, newest_first: list[CheckpointRow], last: int) -> set[CheckpointRow]:
        """Selects from one run's rows."""
        best = self.best_of(newest_first)
        return {*newest_first[:last], *([] if best is None else [best])}

    def best_of(self, rows: Iterable[CheckpointRow]) -> CheckpointRow | None:
        """Returns the best of these rows by metric, the newest of equally good ones; None if none has a metric."""
        sign = 1.0 if self.best == "highest" else -1.0
        rated = [(sign * row.metric, row.at_ns, row) for row in rows if row.metric is not None]
        return max(rated, key=lambda entry: entry[:2])[2] if rated else None


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
        self.retention = retention
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
            self._directory, self._journal, run_id=run_id, retention=self.retention, files=self._files
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
        self._sort_adopted(adopted, known)
        lost = [row for row in known.values() if row.checkpoint_id not in present]
        missing = [row for row in lost if row.state in {"committed", "superseded"}]
        for row in missing:
            self._mark(row, "missing", "its directory is gone")
        return Repairs(tuple(adopted), tuple(row.checkpoint_id for row in missing), tuple(removed))

    def write(
        self,
        image: StateImage,
        *,
        metric: float | None = None,
        provenance: Provenance | None = None,
        keep: Collection[str] = (),
        leaving: bool = False,
    ) -> CheckpointRow:
        """Writes the image durably, commits it in the journal and applies retention.

        On a full disk the superseded checkpoints but `keep` are removed, and it is tried once more.

        Args:
            image: must not change meanwhile (lease it). Sealed here if it is not.
            metric: decides which checkpoint is best; NaN and None never are.
            provenance: its `parent` is determined here.
            keep: ids of checkpoints that are not removed.
            leaving: a rollback is about to leave this state: only superseded checkpoints are removed.

        Raises:
            CheckpointWriteError: the checkpoint is not committed; earlier ones are unchanged. The cause is recorded as
                a fault in the journal, as soon as the journal can be written.
        """
        try:
            row = self._commit_with_room(image, metric, provenance or Provenance(), keep)
        except CheckpointWriteError as error:
            self._fault("checkpoint_failed", image.position.global_step, error.stage, str(error))
            raise
        self._last_fault = None
        self._prune(keep, leaving=leaving)
        self._record_faults()
        return row

    def saved(self, image: StateImage) -> CheckpointRow | None:
        """Returns the run's newest checkpoint of exactly this state, also a superseded one if none is committed.

        Raises CheckpointWriteError.
        """
        digest = image.seal().total
        with _journal_errors():
            same = [row for row in self.kept_points() if row.digest == digest]
        return max(same, key=lambda row: (row.state == "committed", row.at_ns), default=None)

    def restore_points(self) -> tuple[CheckpointRow, ...]:
        """Returns the run's committed checkpoints, oldest first."""
        return self._journal.restore_points(self._run_id)

    def kept_points(self) -> tuple[CheckpointRow, ...]:
        """Returns the run's committed and superseded checkpoints, oldest first."""
        return self._journal.kept_points(self._run_id)

    def follow(self, lineage: Lineage, detail: str) -> int:
        """Supersedes the checkpoints that are not ancestors in `lineage`, as `Journal.follow` does."""
        return self._journal.follow(self._run_id, lineage, detail, time.time_ns())

    def load_newest(self, expired: Callable[[], bool] | None = None) -> LoadedCheckpoint:
        """Loads the run's newest intact checkpoint that is not suspect; suspect ones only if there is no other.

        Superseded ones, proven ones first, only if no other is left: the state that was rolled back to is lost then.

        Raises as `load_first` does.
        """
        newest_first = self.restore_points()[::-1]
        try:
            return self.load_first(sorted(newest_first, key=lambda row: row.doubtful), expired)
        except NoCheckpointError:
            superseded = self.kept_points()[::-1]
            if not superseded or self.restore_points():  # what cannot be read at present may be intact
                raise
        return self.load_first(sorted(superseded, key=lambda row: not row.proven), expired)

    def load_first(self, rows: Sequence[CheckpointRow], expired: Callable[[], bool] | None = None) -> LoadedCheckpoint:
        """Loads the first intact one of these checkpoints.

        Moves damaged checkpoints to the quarantine and tries the next one. Checkpoints that the system cannot read are
        skipped and stay in place.

        Raises:
            NoCheckpointError: none can be loaded.
            RestoreAbandonedError: `expired`, called before each megabyte, returned True.
        """
        damaged: list[Damage] = []
        with self._removal:
            for row in rows:
                try:
                    return LoadedCheckpoint(row, self._read(row, expired), tuple(damaged))
                except (CheckpointDamagedError, CheckpointUnreadableError) as error:
                    quarantined = self._set_aside(row.checkpoint_id, error, row)
                    damaged.append(Damage(row.checkpoint_id, error.stage, error.reason, quarantined))
        tried = "".join(f"; {d.checkpoint_id}: {d.stage}, {d.reason}" for d in damaged)
        raise NoCheckpointError(f"there is no intact checkpoint{tried}")

    def _make_directories(self) -> None:
        for place in (self._directory, self._checkpoints, self._quarantine):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _commit_with_room(
        self, image: StateImage, metric: float | None, provenance: Provenance, keep: Collection[str]
    ) -> CheckpointRow:
        try:
            return self._commit(image, metric, provenance)
        except CheckpointWriteError as error:
            if error.reason not in _NO_SPACE or not self._remove_superseded(keep):
                raise
        return self._commit(image, metric, provenance)

    def _commit(self, image: StateImage, metric: float | None, provenance: Provenance) -> CheckpointRow:
        with _journal_errors():
            rows = self._journal.checkpoints()
        # Later than every other one: the newest must stay the newest when the clock is set back.
        created_at_ns = max([time.time_ns(), *(row.at_ns + 1 for row in rows)])
        parents = [row.checkpoint_id for row in rows if self._is_ancestor(row, image, provenance.lineage)]
        manifest = Manifest.of(
            image,
            checkpoint_id=f"{image.position.global_step:012d}-{uuid.uuid4().hex[:8]}",
            run_id=self._run_id,
            created_at_ns=created_at_ns,
            metric=metric if metric is not None and math.isfinite(metric) else None,
            provenance=replace(provenance, parent=parents[-1] if parents else ""),
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

    def _sort_adopted(self, adopted: Sequence[str], known: Mapping[str, CheckpointRow]) -> None:
        """Supersedes adopted checkpoints that the last rollback has undone, or on another branch than the head.

        The head is the newest checkpoint of their run in the journal or, in a rebuilt journal, the newest of all. A
        rebuilt journal knows no rollbacks, and manifests none that no checkpoint has followed: what such a one has
        undone is the head then, and the run is resumed from it unless it is suspect.
        """
        rows = [row for row in self._journal.checkpoints() if row.state == "committed"]
        for run_id in {row.run_id for row in rows if row.checkpoint_id in adopted}:
            own = [row for row in rows if row.run_id == run_id]
            undone = self._undone(own, run_id)
            own = [row for row in own if row not in undone]
            heads = ([row for row in own if row.checkpoint_id in known] or own)[-1:]
            strays = [row for row in own if not any(_on_one_branch(row, head) for head in heads)]
            for row in (*undone, *strays):
                self._mark(row, "superseded", "adopted from another branch")

    def _undone(self, rows: Sequence[CheckpointRow], run_id: str) -> list[CheckpointRow]:
        """Returns those that the last rollback in the journal has undone: one may have been on its way to the disk."""
        restored = [row for row in self._journal.rows(RollbackRow, run_id=run_id) if row.outcome == "restored"]
        last = max(restored, key=lambda row: row.attempt, default=None)
        if last is None:
            return []
        return [row for row in rows if row.attempt < last.attempt and row.global_step > last.restored_step]

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

    def _is_ancestor(self, row: CheckpointRow, image: StateImage, lineage: Lineage) -> bool:
        included = row.run_id == self._run_id and lineage.includes(row.attempt, row.global_step)
        return included and row.state == "committed" and row.global_step <= image.position.global_step

    def _prune(self, keep: Collection[str], *, leaving: bool) -> None:
        try:
            rows = self._journal.checkpoints()
            committed = [row for row in rows if row.state == "committed"]
            superseded = [row for row in rows if row.state == "superseded"]
            kept = self.retention.kept(committed, run_id=self._run_id)
            kept |= self.retention.kept_superseded(superseded, run_id=self._run_id, now_ns=time.time_ns())
            candidates = superseded if leaving else [*superseded, *committed]
            unneeded = [row for row in candidates if row not in kept and row.checkpoint_id not in keep]
            self._remove(unneeded, "retention")
        except JournalError as error:  # the new checkpoint is committed; writing the next one prunes again
            self._fault("retention_failed", -1, "journal", str(error))

    def _remove_superseded(self, keep: Collection[str]) -> bool:
        """Makes room on a full disk; returns whether there was anything to remove."""
        try:
            rows = self._journal.checkpoints()
            superseded = [row for row in rows if row.state == "superseded" and row.checkpoint_id not in keep]
            self._remove(superseded, "the disk is full", files_first=True)
        except JournalError:
            return False  # the disk is too full for the journal as well
        return bool(superseded)

    def _remove(self, rows: Sequence[CheckpointRow], detail: str, *, files_first: bool = False) -> None:
        """Marks each row, then removes the files: a crash in between leaves no row committed without its files.

        With `files_first`, which makes room for the mark, it leaves a superseded row without its files: `repair` finds
        it.
        """
        with self._removal:
            for row in rows:
                if files_first:
                    remove_quietly(self._files, self._checkpoints / row.checkpoint_id)
                self._mark(row, "pruned", detail)
                if not files_first:
                    remove_quietly(self._files, self._checkpoints / row.checkpoint_id)

    def _mark(self, row: CheckpointRow, state: CheckpointState, detail: str) -> None:
        self._journal.revise(row.checkpoint_id, state=state, detail=detail)

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


def _on_one_branch(row: CheckpointRow, other: CheckpointRow) -> bool:
    """Whether one of two checkpoints of a run is an ancestor of the other."""
    return row.lineage.includes(other.attempt, other.global_step) or other.lineage.includes(
        row.attempt, row.global_step
    )


@contextlib.contextmanager
def _journal_errors() -> Iterator[None]:
    try:
        yield
    except JournalError as error:
        raise CheckpointWriteError("journal", "journal", str(error)) from error
