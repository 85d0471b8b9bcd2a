"""Which replica a run goes on from, and how it becomes a checkpoint.

A replica that is restored is written as a checkpoint first: so it is durable at once, and everything that holds for
resuming from a checkpoint holds for it too.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import structlog

from tolaria.checkpoint.storage import Storage
from tolaria.journal.rows import CheckpointRow, FaultRow, RollbackRow
from tolaria.ranks.replicas import FoundReplica, LiveSnapshots, ReplicaPoint
from tolaria.run.restore_points import RestorePoint
from tolaria.values.lineage import Lineage

_log = structlog.get_logger(__name__)


def live_snapshots(run_id: str, points: list[RestorePoint], lineage: Lineage) -> LiveSnapshots:
    """Returns the snapshots in memory that replicas are made of; `lineage` is that of the live state."""
    found = list[ReplicaPoint]()
    for point in points:
        if point.checkpoint is None and point.digest and not point.suspect:
            ancestor = lineage.at(point.global_step)
            forks = ancestor.to_json()
            found.append(
                ReplicaPoint(run_id, point.digest, point.global_step, ancestor.attempt, forks, proven=point.proven)
            )
    return LiveSnapshots(tuple(found), lineage)


def wanted_replicas(storage: Storage, run_id: str, *, running: bool = False) -> Callable[[ReplicaPoint], bool]:
    """Returns what says whether the run is to go on from a replica, by what the journal says now. Raises JournalError.

    It has to be newer than the checkpoint that the run would be resumed from, a descendant of that, and not undone by
    a rollback. A `running` service goes on from a proven checkpoint rather than from a newer one, so that there only a
    replica that is proven replaces it.
    """
    restored = [row for row in storage.journal.rows(RollbackRow, run_id=run_id) if row.outcome == "restored"]
    rows = storage.for_run(run_id).checkpoints.restore_points()
    head = next(reversed([row for row in rows if not row.doubtful] or list(rows)), None)
    has_proven = any(row.proven or row.global_step == 0 for row in rows)

    def is_wanted(point: ReplicaPoint) -> bool:
        try:
            lineage = point.lineage
        except (ValueError, TypeError, OverflowError, RecursionError):
            return False
        undone = any(point.attempt < row.attempt and point.global_step > row.restored_step for row in restored)
        unused = running and has_proven and not point.proven
        if undone or unused or point.run_id != run_id:
            return False
        if head is None:
            return True
        return point.global_step > head.global_step and lineage.includes(head.attempt, head.global_step)

    return is_wanted


def record(storage: Storage, row: CheckpointRow, found: FoundReplica) -> None:
    """Records that a replica has become the checkpoint `row`, as the incident `replica_restored`. Raises JournalError.

    What had proven the snapshot proves the checkpoint.
    """
    point = found.point
    reason = (
        f"the snapshots in memory are lost: the run goes on from the replica of step {point.global_step} that "
        f"{found.host} kept, digest {point.digest}, as checkpoint {row.checkpoint_id}"
    )
    if point.proven:
        storage.journal.revise(row.checkpoint_id, proven=1)
    fault = FaultRow(
        uuid.uuid4().hex, time.time_ns(), row.run_id, "replica_restored", row.global_step, "resume", reason
    )
    storage.journal.put(fault)
    _log.warning("replica_restored", step=row.global_step, host=found.host, checkpoint_id=row.checkpoint_id)
