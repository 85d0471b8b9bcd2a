from __future__ import annotations

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL
from tolaria.images import SnapshotInfo
from tolaria.journal.rows import CheckpointRow, Incident
from tolaria.rpc.listing import list_incidents, list_restore_points
from tolaria.run.restore_points import RestorePoints
from tolaria.values.training import Position

COMMITTED = CheckpointRow("c10", 1_500_000_000, "run", 10, 2, 300, "digest10", 0.5, parent="c5", proven=1)
LATE = CheckpointRow("c40", 2, "run", 40, 4, 300, "digest40", None, suspect=1)
LEFT = CheckpointRow("c50", 3, "run", 50, 5, 300, "digest50", None, state="superseded", attempt=2)
SEALED = SnapshotInfo(Position(10, 2), 200, "digest", at_ns=7)
UNSEALED = SnapshotInfo(Position(12, 2), 200, None, at_ns=8)


def test_restore_points() -> None:
    """They are listed newest first, with their flags, attempt and parent; a snapshot has an age too."""
    points = list_restore_points(RestorePoints().of([SEALED, UNSEALED], [COMMITTED, LATE, LEFT])).restore_points
    assert [(p.tier, p.global_step, p.stable, p.suspect, p.superseded, p.attempt) for p in points] == [
        (ROLLBACK_TIER_FULL, 50, False, False, True, 2),
        (ROLLBACK_TIER_FULL, 40, False, True, False, 1),
        (ROLLBACK_TIER_FAST, 12, False, False, False, 1),
        (ROLLBACK_TIER_FAST, 10, False, False, False, 1),
        (ROLLBACK_TIER_FULL, 10, True, False, False, 1),
    ]
    snapshot, checkpoint = points[3], points[4]
    assert (snapshot.epoch, snapshot.size_bytes, snapshot.digest, snapshot.checkpoint_id) == (2, 200, "digest", "")
    assert snapshot.created_at.ToNanoseconds() == 7
    assert (checkpoint.checkpoint_id, checkpoint.digest, checkpoint.size_bytes) == ("c10", "digest10", 300)
    assert checkpoint.created_at.ToNanoseconds() == 1_500_000_000
    assert checkpoint.parent_checkpoint_id == "c5"


def test_incidents() -> None:
    """They keep their order; one that belongs to no step has step 0."""
    incident = Incident("i", "journal_rebuilt", 2_000_000_001, -1, "it was damaged", {"stage": "open"})
    (message,) = list_incidents([incident]).incidents
    assert (message.incident_id, message.kind, message.reason) == ("i", "journal_rebuilt", "it was damaged")
    assert dict(message.details) == {"stage": "open"}
    assert (message.global_step, message.occurred_at.ToNanoseconds()) == (0, 2_000_000_001)
