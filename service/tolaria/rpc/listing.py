"""Messages about restore points and incidents, made from snapshots and journal rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL
from tolaria.images import SnapshotInfo
from tolaria.journal.rows import CheckpointRow, Incident

INCIDENTS_DEFAULT: Final = 100
INCIDENTS_MAX: Final = 1000
"""Incidents in one answer: a few hundred kilobytes, far below the limit of a gRPC message."""


def list_incidents(incidents: Iterable[Incident]) -> admin.ListIncidentsResponse:
    """Returns the incidents in the given order."""
    return admin.ListIncidentsResponse(
        incidents=[
            admin.Incident(
                incident_id=incident.incident_id,
                kind=incident.kind,
                occurred_at=_timestamp(incident.at_ns),
                global_step=max(0, incident.global_step),  # -1 for faults that belong to no step
                reason=incident.reason,
                details=incident.details,
            )
            for incident in incidents
        ]
    )


def list_restore_points(
    checkpoints: Iterable[CheckpointRow], snapshots: Iterable[SnapshotInfo], *, healthy_step: int | None
) -> admin.ListRestorePointsResponse:
    """Returns the restore points, newest first; for the same step, the snapshot before the checkpoints.

    Of `checkpoints`, oldest first, only committed ones are listed. Snapshots have no timestamp. Points
    after `healthy_step` (None: no step has been judged) are not stable, nor is a snapshot without a digest.
    """
    points = [_snapshot_point(info, healthy_step) for info in snapshots]
    newest_first = reversed(list(checkpoints))  # of several for one step, a rollback takes the newest
    points += [_checkpoint_point(row, healthy_step) for row in newest_first if row.state == "committed"]
    points.sort(key=lambda point: point.global_step, reverse=True)
    return admin.ListRestorePointsResponse(restore_points=points)


def _snapshot_point(info: SnapshotInfo, healthy_step: int | None) -> admin.RestorePoint:
    step = info.position.global_step
    return admin.RestorePoint(
        tier=ROLLBACK_TIER_FAST,
        global_step=step,
        epoch=info.position.epoch,
        size_bytes=info.size_bytes,
        digest=info.digest or "",
        stable=info.digest is not None and _healthy(step, healthy_step),
    )


def _checkpoint_point(row: CheckpointRow, healthy_step: int | None) -> admin.RestorePoint:
    return admin.RestorePoint(
        tier=ROLLBACK_TIER_FULL,
        global_step=row.global_step,
        epoch=row.epoch,
        size_bytes=row.size_bytes,
        digest=row.digest,
        created_at=_timestamp(row.at_ns),
        checkpoint_id=row.checkpoint_id,
        stable=_healthy(row.global_step, healthy_step),
    )


def _healthy(step: int, healthy_step: int | None) -> bool:
    return healthy_step is None or step <= healthy_step


def _timestamp(at_ns: int) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(at_ns)
    return timestamp
