"""Rows of the journal and Leyline messages, made from each other: what operators are shown, what is put on record.

Pure. Must not know where rows come from or go to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from leyline.v1.admin_service_pb2 import (
    CreateCheckpointResponse,
    ListIncidentsResponse,
    ListRestorePointsResponse,
    RestorePoint,
)
from leyline.v1.admin_service_pb2 import Incident as IncidentMessage
from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, CommandType, EmergencyLevel
from tolaria.images.image import SnapshotInfo
from tolaria.journal.rows import AdminActionRow, CheckpointRow, CommandRow, EmergencyRow, Incident

if TYPE_CHECKING:
    from leyline.v1.commands_pb2 import AdaptationCommand
    from tolaria.emergency.protocol import EmergencyState

INCIDENTS_SHOWN: Final = 100
"""Incidents in an answer to who names no number."""

INCIDENTS_SHOWN_MAX: Final = 1000
"""Incidents in any answer: some hundred kilobytes, far below what a gRPC message may have."""


def incident_limit(asked: int) -> int:
    """How many incidents to show to who asks for so many; 0: no number was named."""
    return min(asked or INCIDENTS_SHOWN, INCIDENTS_SHOWN_MAX)


def list_incidents(incidents: Iterable[Incident]) -> ListIncidentsResponse:
    """In the order given."""
    return ListIncidentsResponse(incidents=[_incident(incident) for incident in incidents])


def list_restore_points(
    checkpoints: Iterable[CheckpointRow], snapshots: Iterable[SnapshotInfo], *, healthy_step: int | None
) -> ListRestorePointsResponse:
    """What a rollback can go to, newest step first, of one step the snapshot before the checkpoint.

    Args:
        checkpoints: of the run; only committed ones are shown.
        snapshots: in memory. When one was taken is not known: its `created_at` is absent.
        healthy_step: the last step after which training was known to be well; later points are not stable, nor is a
            snapshot without a digest to prove itself by. None: nothing has ever gone wrong.
    """
    points = [_snapshot_point(info, healthy_step) for info in snapshots]
    points += [_checkpoint_point(row, healthy_step) for row in checkpoints if row.state == "committed"]
    points.sort(key=lambda point: point.global_step, reverse=True)
    return ListRestorePointsResponse(restore_points=points)


def checkpoint_created(row: CheckpointRow) -> CreateCheckpointResponse:
    """The answer to who asked for a checkpoint."""
    return CreateCheckpointResponse(
        global_step=row.global_step, checkpoint_id=row.checkpoint_id, digest=row.digest, size_bytes=row.size_bytes
    )


def command_row(
    command: AdaptationCommand, *, at_ns: int, run_id: str, global_step: int, rejected: str = ""
) -> CommandRow:
    """For a command that took effect at a step, or that was rejected there; then `rejected` says why.

    A rejected one has the time in its key: a replayed command must not take the place of the one that was applied.
    """
    return CommandRow(
        command_id=f"{command.command_id}@{at_ns}" if rejected else command.command_id,
        at_ns=at_ns,
        run_id=run_id,
        kind=_word(CommandType.items(), command.command_type, "COMMAND_"),
        global_step=global_step,
        outcome="rejected" if rejected else "applied",
        reason=rejected,
    )


def admin_row(
    request_id: str, answer: Message, *, at_ns: int, run_id: str, reason: str, global_step: int
) -> AdminActionRow:
    """For an operator's request and its answer, whose type tells which call it was."""
    return AdminActionRow(
        request_id=request_id,
        at_ns=at_ns,
        run_id=run_id,
        method=answer.DESCRIPTOR.name.removesuffix("Response"),
        reason=reason,
        global_step=global_step,
        answer=answer.SerializeToString(deterministic=True),
    )


def emergency_row(
    emergency_id: str, state: EmergencyState, *, at_ns: int, run_id: str, global_step: int, cleared_at_ns: int | None
) -> EmergencyRow:
    """For an emergency as it stands; noted again under the same id when it has been cleared."""
    return EmergencyRow(
        emergency_id=emergency_id,
        at_ns=at_ns,
        run_id=run_id,
        level=_word(EmergencyLevel.items(), state.level, "EMERGENCY_LEVEL_"),
        origin=state.origin,
        global_step=global_step,
        reason=state.reason,
        cleared_at_ns=cleared_at_ns,
    )


def _snapshot_point(info: SnapshotInfo, healthy_step: int | None) -> RestorePoint:
    step = info.position.global_step
    return RestorePoint(
        tier=ROLLBACK_TIER_FAST,
        global_step=step,
        epoch=info.position.epoch,
        size_bytes=info.size_bytes,
        digest=info.digest or "",
        stable=info.digest is not None and _healthy(step, healthy_step),
    )


def _checkpoint_point(row: CheckpointRow, healthy_step: int | None) -> RestorePoint:
    return RestorePoint(
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


def _incident(incident: Incident) -> IncidentMessage:
    return IncidentMessage(
        incident_id=incident.incident_id,
        kind=incident.kind,
        occurred_at=_timestamp(incident.at_ns),
        global_step=max(0, incident.global_step),  # faults that belong to no step have -1
        reason=incident.reason,
        details=incident.details,
    )


def _timestamp(at_ns: int) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(at_ns)
    return timestamp


def _word(names: Iterable[tuple[str, int]], value: int, prefix: str) -> str:
    """An enum's value as people read it; its number where the contract has no name for it."""
    return next((name.removeprefix(prefix).lower() for name, number in names if number == value), str(value))
