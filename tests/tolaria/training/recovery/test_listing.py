from __future__ import annotations

import pytest

from leyline.v1.admin_service_pb2 import PauseTrainingResponse
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    COMMAND_SEED,
    EMERGENCY_LEVEL_HALT,
    ROLLBACK_TIER_FAST,
    ROLLBACK_TIER_FULL,
    CommandType,
)
from tolaria.emergency.protocol import EmergencyState
from tolaria.images.image import SnapshotInfo
from tolaria.journal.rows import CheckpointRow, EmergencyRow, Incident
from tolaria.training.recovery.listing import (
    INCIDENTS_SHOWN,
    INCIDENTS_SHOWN_MAX,
    admin_row,
    checkpoint_created,
    command_row,
    emergency_row,
    incident_limit,
    list_incidents,
    list_restore_points,
)
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
    """Newest first, committed ones alone; stable is what can prove itself and is not later than the last good step."""
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
    assert (snapshot.epoch, snapshot.size_bytes, snapshot.digest, snapshot.HasField("created_at")) == (
        2,
        200,
        "digest",
        False,
    )
    assert (checkpoint.checkpoint_id, checkpoint.digest, checkpoint.size_bytes) == ("c10", "digest10", 300)
    assert checkpoint.created_at.ToNanoseconds() == 1_500_000_000


def test_incidents() -> None:
    """In the order given; what belongs to no step says 0."""
    incident = Incident("i", "journal_rebuilt", 2_000_000_001, -1, "it was damaged", {"stage": "open"})
    (message,) = list_incidents([incident]).incidents
    assert (message.incident_id, message.kind, message.reason, dict(message.details)) == (
        "i",
        "journal_rebuilt",
        "it was damaged",
        {"stage": "open"},
    )
    assert (message.global_step, message.occurred_at.ToNanoseconds()) == (0, 2_000_000_001)


@pytest.mark.parametrize(
    ("asked", "shown"),
    [(0, INCIDENTS_SHOWN), (1, 1), (INCIDENTS_SHOWN_MAX + 1, INCIDENTS_SHOWN_MAX), (2**32 - 1, INCIDENTS_SHOWN_MAX)],
)
def test_the_number_of_incidents_is_bounded(asked: int, shown: int) -> None:
    """Whoever names none gets the usual number, nobody more than fits into a message."""
    assert incident_limit(asked) == shown


def test_an_answer_about_a_new_checkpoint() -> None:
    """What the operator needs to find it again."""
    answer = checkpoint_created(COMMITTED)
    assert (answer.global_step, answer.checkpoint_id, answer.digest, answer.size_bytes) == (10, "c10", "digest10", 300)


def test_rows_of_commands() -> None:
    """Applied under its own id, rejected under one that hides no other; an unknown type is its number."""
    applied = command_row(
        AdaptationCommand(command_id="c", command_type=COMMAND_SEED), at_ns=7, run_id="run", global_step=3
    )
    assert (applied.command_id, applied.kind, applied.outcome, applied.reason) == ("c", "seed", "applied", "")
    unknown = AdaptationCommand(command_id="c", command_type=CommandType.ValueType(77))
    rejected = command_row(unknown, at_ns=8, run_id="run", global_step=4, rejected="replayed")
    assert (rejected.kind, rejected.outcome, rejected.reason) == ("77", "rejected", "replayed")
    assert rejected.command_id not in {
        "c",
        command_row(unknown, at_ns=9, run_id="r", global_step=4, rejected="x").command_id,
    }


def test_rows_of_actions() -> None:
    """The answer comes back as it was given, and its type names the call."""
    answer = PauseTrainingResponse(global_step=12)
    row = admin_row("q", answer, at_ns=1, run_id="run", reason="lunch", global_step=12)
    assert (row.request_id, row.method, row.reason, row.global_step) == ("q", "PauseTraining", "lunch", 12)
    assert PauseTrainingResponse.FromString(row.answer) == answer


def test_rows_of_emergencies() -> None:
    """Raised and cleared are one row, by its id."""
    state = EmergencyState(level=EMERGENCY_LEVEL_HALT, reason="hung", origin="sentinel")
    row = emergency_row("e", state, at_ns=1, run_id="run", global_step=3, cleared_at_ns=9)
    assert row == EmergencyRow("e", 1, "run", "halt", "sentinel", 3, "hung", 9)
