"""The restore points of a run, in memory and on disk: which are proven or suspect, and which one a rollback takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, ROLLBACK_TIER_UNSPECIFIED, RollbackTier
from tolaria.checkpoint.format import Provenance
from tolaria.checkpoint.writer import CaptureMark
from tolaria.images import SnapshotInfo
from tolaria.journal.rows import CheckpointRow
from tolaria.rollback.protocol import Rollback
from tolaria.values.lineage import Lineage

_PROVEN_MAX: Final = 64
"""Proven checkpoints that are remembered, newest first: retention has removed older ones long since.

Also the number of checkpoints whose flags are remembered, besides those that are not proven yet.
"""

PROOF_LOSSES: Final = 3
"""Losses at or below the top of the window that prove the points before them."""


REACH_STEPS: Final = 64
"""Steps that a preferred point may cost more: beyond that, the newest one from before the evidence is taken."""


@dataclass(frozen=True, slots=True)
class RestorePoint:
    """A state that a rollback can go to. `checkpoint` is None for a snapshot; times are Unix nanoseconds."""

    tier: RollbackTier.ValueType
    global_step: int
    epoch: int
    at_ns: int
    size_bytes: int
    digest: str
    attempt: int
    suspect: bool
    proven: bool
    checkpoint: CheckpointRow | None = None

    @property
    def superseded(self) -> bool:
        """Whether it is not an ancestor of the live state."""
        return self.checkpoint is not None and self.checkpoint.state == "superseded"

    @property
    def age_key(self) -> tuple[int, bool, int]:
        """Sorts points from old to new; of the same step, the snapshot in memory is the newest."""
        return self.global_step, self.tier == ROLLBACK_TIER_FAST, self.at_ns

    def __str__(self) -> str:
        return "the snapshot" if self.checkpoint is None else f"checkpoint {self.checkpoint.checkpoint_id}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The point that a rollback takes, and why. `checkpoints` are tried in this order if it is one of them."""

    point: RestorePoint
    why: str
    checkpoints: tuple[CheckpointRow, ...]

    def __str__(self) -> str:
        return f"{self.why}: {self.point}"


def choose(points: Iterable[RestorePoint], rollback: Rollback) -> Choice | None:
    """Returns the restore point for a rollback; None if there is none that it may take.

    A checkpoint that is named is taken, also a superseded one. Otherwise only ancestors of the live state count, of
    the tier that is named; for a target step the nearest one at or before it. Automatic rollbacks, to a target step
    too, take the newest proven one from before the evidence, or a slightly older one from before the losses began to
    rise. An operator's takes the newest proven one, else the newest not suspect.
    """
    if rollback.checkpoint_id:
        named = [p for p in points if p.checkpoint is not None and p.checkpoint.checkpoint_id == rollback.checkpoint_id]
        return _newest_of(named, "the one that was named")
    allowed = [point for point in points if _allowed(point, rollback)]
    proven_points = [point for point in allowed if point.proven]
    if rollback.target_step is not None:
        candidates, kind = (proven_points, "nearest proven one") if rollback.automatic else (allowed, "nearest")
        return _newest_of(candidates, f"the {kind} at or before step {rollback.target_step}")
    better = [point for point in proven_points if _preferred(point, rollback)]
    proven = _newest_of(better or proven_points, "the newest proven one")
    if proven is not None or rollback.automatic:
        return proven
    return _newest_of([point for point in allowed if not point.suspect], "none is proven, the newest not suspect")


def _allowed(point: RestorePoint, rollback: Rollback) -> bool:
    return (
        not point.superseded
        and (point.checkpoint is None or point.checkpoint.checkpoint_id != rollback.made_checkpoint_id)
        and rollback.tier in {ROLLBACK_TIER_UNSPECIFIED, point.tier}
        and (rollback.before_step is None or point.global_step < rollback.before_step)
        and (rollback.target_step is None or point.global_step <= rollback.target_step)
    )


def _preferred(point: RestorePoint, rollback: Rollback) -> bool:
    """Whether a point is before the preferred step, and not further before it than that is before the evidence."""
    if rollback.preferred_before is None or rollback.before_step is None:
        return False
    reach = max(REACH_STEPS, rollback.before_step - rollback.preferred_before)
    return rollback.preferred_before - reach <= point.global_step < rollback.preferred_before


def _newest_of(points: Sequence[RestorePoint], why: str) -> Choice | None:
    if not points:
        return None
    newest_first = sorted(points, key=lambda point: point.age_key, reverse=True)
    rows = tuple(p.checkpoint for p in newest_first if p.checkpoint is not None)
    return Choice(newest_first[0], why, rows)


class RestorePoints:
    """Keeps the lineage of the live state, and which points are proven or suspect. Used on the event loop only.

    Events are applied in the lane's order, so that a point gets the flags of the moment of its capture.

    Args:
        lineage: of the state at which the run begins in this process.
        attempts: the highest attempt number that the run has used.
        resumed: the checkpoint that the run was resumed from; None for a new run.
    """

    def __init__(self, lineage: Lineage | None = None, attempts: int = 1, resumed: CheckpointRow | None = None) -> None:
        self.lineage = lineage or Lineage()
        self.resumed = resumed
        self._attempts = attempts
        self._suspect = False
        self._sound_losses = 0
        self._snapshots: dict[int, _Flags] = {}
        """Flags of the snapshots in memory by step; all of them are ancestors of the live state."""
        self._captured: dict[int, _Flags] = {}
        """Flags of the states on their way to disk by step."""
        self._checkpoints: dict[str, _Flags] = {}
        """Flags of checkpoints that were captured in this process, and of the one that was resumed from."""
        self._proven_rows: dict[str, CheckpointRow] = {}
        self._watched: dict[str, CheckpointRow] = {}
        """Committed checkpoints that are not proven yet."""
        if resumed is not None:
            self._resume(resumed)

    # -- events ------------------------------------------------------------------------------------------------------

    def step_done(self, *, above: bool, suspect: bool) -> list[str]:
        """Handles a finite step; returns the ids of checkpoints that it has proven.

        Args:
            above: whether its loss lies above the top of the window.
            suspect: whether a state that is captured now is suspect.
        """
        self._suspect = suspect
        self._sound_losses += not above
        return self._prove()

    def snapshots_changed(self, snapshots: Iterable[SnapshotInfo]) -> None:
        """Handles the snapshots that are in memory now."""
        steps = [info.position.global_step for info in snapshots]
        self._snapshots = {step: self._snapshots.get(step) or self._flags(step) for step in steps}

    def captured(self, global_step: int) -> CaptureMark:
        """Returns the mark of a state that has just been captured for a checkpoint."""
        flags = self._snapshots.get(global_step) or self._flags(global_step)
        self._captured[global_step] = flags
        newest = max(self._proven_rows.values(), key=lambda row: (row.global_step, row.at_ns), default=None)
        return CaptureMark(
            Provenance(self.lineage, suspect=flags.suspect), "" if newest is None else newest.checkpoint_id
        )

    def committed(self, row: CheckpointRow) -> list[str]:
        """Handles a checkpoint that has been written; returns its id if losses since its capture prove it."""
        flags = self._captured.pop(row.global_step, None) or self._flags(row.global_step)
        self._checkpoints[row.checkpoint_id] = flags
        self._watched[row.checkpoint_id] = row
        for old in list(self._checkpoints)[:-_PROVEN_MAX]:
            if old not in self._watched:  # the journal says by now that it is proven, or it has been superseded
                del self._checkpoints[old]
        return self._prove()

    def rewound(self, global_step: int, origin: CheckpointRow | None) -> None:
        """Handles a restored state: a new attempt begins. `origin` is its checkpoint unless that is an ancestor."""
        base = self.lineage if origin is None else origin.lineage
        self._attempts += 1
        self.lineage = base.back_to(global_step, self._attempts)
        self._suspect = False
        self._snapshots = {step: flags for step, flags in self._snapshots.items() if step <= global_step}
        self._captured = {}
        self._watched = self._ancestors(self._watched)
        self._proven_rows = self._ancestors(self._proven_rows)

    # -- queries -----------------------------------------------------------------------------------------------------

    def of(self, snapshots: Iterable[SnapshotInfo], rows: Iterable[CheckpointRow]) -> list[RestorePoint]:
        """Returns the points for these snapshots and kept checkpoints, the newest step first."""
        points = [self._snapshot(info) for info in snapshots]
        points += [self._checkpoint(row) for row in rows]
        return sorted(points, key=lambda point: point.age_key, reverse=True)

    @property
    def newest_proven_step(self) -> int | None:
        """Step of the newest proven ancestor of the live state, over both tiers; None if there is none."""
        steps = [step for step, flags in self._snapshots.items() if self._is_proven(flags)]
        steps += [row.global_step for row in self._proven_rows.values()]
        return max(steps, default=None)

    def _snapshot(self, info: SnapshotInfo) -> RestorePoint:
        step = info.position.global_step
        flags = self._snapshots.get(step) or self._flags(step)
        proven = info.digest is not None and self._is_proven(flags)
        return RestorePoint(
            tier=ROLLBACK_TIER_FAST,
            global_step=step,
            epoch=info.position.epoch,
            at_ns=info.at_ns,
            size_bytes=info.size_bytes,
            digest=info.digest or "",
            attempt=self.lineage.attempt_at(step),
            suspect=flags.suspect and not proven,
            proven=proven,
        )

    def _checkpoint(self, row: CheckpointRow) -> RestorePoint:
        flags = self._checkpoints.get(row.checkpoint_id)
        proven = bool(row.proven) or row.global_step == 0 or (flags is not None and self._is_proven(flags))
        return RestorePoint(
            tier=ROLLBACK_TIER_FULL,
            global_step=row.global_step,
            epoch=row.epoch,
            at_ns=row.at_ns,
            size_bytes=row.size_bytes,
            digest=row.digest,
            attempt=row.attempt,
            suspect=bool(row.suspect) and not proven,
            proven=proven,
            checkpoint=row,
        )

    def _flags(self, global_step: int) -> _Flags:
        """Returns the flags of a state that is captured now; the state before the first step counts as proven."""
        return _Flags(self._suspect, 0 if global_step == 0 else self._sound_losses + PROOF_LOSSES)

    def _is_proven(self, flags: _Flags) -> bool:
        return self._sound_losses >= flags.proven_at

    def _prove(self) -> list[str]:
        proven = [checkpoint_id for checkpoint_id in self._watched if self._is_proven(self._checkpoints[checkpoint_id])]
        for checkpoint_id in proven:
            self._proven_rows[checkpoint_id] = self._watched.pop(checkpoint_id)
            if len(self._proven_rows) > _PROVEN_MAX:
                del self._proven_rows[next(iter(self._proven_rows))]
        return proven

    def _ancestors(self, rows: Mapping[str, CheckpointRow]) -> dict[str, CheckpointRow]:
        return {key: row for key, row in rows.items() if self.lineage.includes(row.attempt, row.global_step)}

    def _resume(self, row: CheckpointRow) -> None:
        """Gives the flags of the checkpoint to the snapshot that is taken of the same state."""
        proven_at = 0 if row.proven else PROOF_LOSSES
        self._snapshots[row.global_step] = self._checkpoints[row.checkpoint_id] = _Flags(row.doubtful, proven_at)
        (self._proven_rows if row.proven else self._watched)[row.checkpoint_id] = row


@dataclass(frozen=True, slots=True)
class _Flags:
    """Whether a point is suspect, and the number of sound losses from which on it is proven."""

    suspect: bool
    proven_at: int


def attempts_used(rows: Collection[CheckpointRow], rollbacks: Iterable[int]) -> int:
    """Returns the highest attempt number of a run, from its checkpoints and the attempts of its rollbacks."""
    return max([1, *(row.attempt for row in rows), *rollbacks])


def resumed_points(resumed: CheckpointRow, rows: Collection[CheckpointRow], attempts: int) -> RestorePoints:
    """Returns the points of a run that goes on from a checkpoint.

    A new attempt begins if the run has written points that are not ancestors of the checkpoint, even if they have been
    removed since: the next states must not be taken for theirs.
    """
    lineage = resumed.lineage
    left = attempts > resumed.attempt or any(
        row.attempt == resumed.attempt and row.global_step > resumed.global_step for row in rows
    )
    if left:
        attempts += 1
        lineage = lineage.back_to(resumed.global_step, attempts)
    return RestorePoints(lineage, attempts, resumed)
