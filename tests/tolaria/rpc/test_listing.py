from __future__ import annotations

import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL
from tolaria.images import SnapshotInfo
from tolaria.journal.rows import CheckpointRow, Incident
from tolaria.rpc.listing import list_incidents, list_restore_points
from tolaria.values.training import Position

COMMITTED = CheckpointRow("c10", 1_500_000_000, "run", 10, 2, 300, "digest10", 0.5)
PRUNED = CheckpointRow("c5", 1, "run", 5, 1, 300, "digest5", None, state="pruned")
LATE = CheckpointRow("c40", 2, "run", 40, 4, 300, "digest40", None)
SEALED = SnapshotInfo(Position(10, 2), 200, "digest")
UNSEALED = SnapshotInfo(Position(12, 2), 200, None)


@pytest.mark.parametrize(
    ("healthy_step", "stable"),
    [
        (None, [True, False, True, True]),
        (40, [True, False, True, True]),
        (10, [False] * 2 + [True] * 2),
        (9, [False] * 4),
    ],
)
def test_restore_points(healthy_step: int | None, stable: list[bool]) -> None:
    """They are listed newest first; stable ones have a digest and are not later than the last healthy step."""
    points = list_restore_points(
        [PRUNED, COMMITTED, LATE], [SEALED, UNSEALED], healthy_step=healthy_step
    ).restore_points
    assert [(p.tier, p.global_step) for p in points] == [
        (ROLLBACK_TIER_FULL, 40),
        (ROLLBACK_TIER_FAST, 12),
        (ROLLBACK_TIER_FAST, 10),
        (ROLLBACK_TIER_FULL, 10),
    ]
    assert [p.stable for p in points] == stable
    snapshot, checkpoint = points[2], points[3]
    assert (snapshot.epoch, snapshot.size_bytes, snapshot.digest) == (2, 200, "digest")
    assert not snapshot.HasField("created_at")
    assert (checkpoint.checkpoint_id, checkpoint.digest, checkpoint.size_bytes) == ("c10", "digest10", 300)
    assert checkpoint.created_at.ToNanoseconds() == 1_500_000_000


def test_incidents() -> None:
    """They keep their order; one that belongs to no step has step 0."""
    incident = Incident("i", "journal_rebuilt", 2_000_000_001, -1, "it was damaged", {"stage": "open"})
    (message,) = list_incidents([incident]).incidents
    assert (message.incident_id, message.kind, message.reason) == ("i", "journal_rebuilt", "it was damaged")
    assert dict(message.details) == {"stage": "open"}
    assert (message.global_step, message.occurred_at.ToNanoseconds()) == (0, 2_000_000_001)
