"""Messages about restore points, incidents and the calls of operators."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from leyline.v1 import admin_service_pb2 as admin
from tolaria.errors import InvalidFieldError
from tolaria.journal.rows import AdminCallRow, Incident
from tolaria.run.restore_points import RestorePoint

INCIDENTS_DEFAULT: Final = 100
INCIDENTS_MAX: Final = 1000
"""Incidents or calls in one answer: a few hundred kilobytes, far below the limit of a gRPC message."""


def limited(limit: int) -> int:
    """Returns how many are listed for the limit of a request. Raises InvalidFieldError."""
    if limit > INCIDENTS_MAX:
        raise InvalidFieldError("limit", f"must not be more than {INCIDENTS_MAX}, is {limit}")
    return limit or INCIDENTS_DEFAULT


def list_admin_calls(rows: Iterable[AdminCallRow]) -> admin.ListAdminCallsResponse:
    """Returns the calls in the given order."""
    return admin.ListAdminCallsResponse(
        calls=[
            admin.AdminCall(
                call_id=row.call_id,
                called_at=timestamp(row.at_ns),
                method=row.method,
                request_id=row.request_id,
                caller=row.caller,
                role=row.role,
                peer=row.peer,
                reason=row.reason,
                global_step=max(0, row.global_step),
                outcome=row.outcome,
                detail=row.detail,
                run_id=row.run_id,
            )
            for row in rows
        ]
    )


def list_incidents(incidents: Iterable[Incident]) -> admin.ListIncidentsResponse:
    """Returns the incidents in the given order."""
    return admin.ListIncidentsResponse(
        incidents=[
            admin.Incident(
                incident_id=incident.incident_id,
                kind=incident.kind,
                occurred_at=timestamp(incident.at_ns),
                global_step=max(0, incident.global_step),  # -1 for faults that belong to no step
                reason=incident.reason,
                details=incident.details,
            )
            for incident in incidents
        ]
    )


def list_restore_points(points: Iterable[RestorePoint]) -> admin.ListRestorePointsResponse:
    """Returns the restore points in the given order."""
    return admin.ListRestorePointsResponse(
        restore_points=[
            admin.RestorePoint(
                tier=point.tier,
                global_step=point.global_step,
                epoch=point.epoch,
                size_bytes=point.size_bytes,
                digest=point.digest,
                created_at=timestamp(point.at_ns),
                checkpoint_id="" if point.checkpoint is None else point.checkpoint.checkpoint_id,
                stable=point.proven,
                suspect=point.suspect,
                attempt=point.attempt,
                parent_checkpoint_id="" if point.checkpoint is None else point.checkpoint.parent,
                superseded=point.superseded,
            )
            for point in points
        ]
    )


def timestamp(at_ns: int) -> Timestamp:
    """Returns a Unix time in nanoseconds as a message."""
    timestamp = Timestamp()
    timestamp.FromNanoseconds(at_ns)
    return timestamp
