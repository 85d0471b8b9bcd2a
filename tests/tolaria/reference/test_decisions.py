from __future__ import annotations

import pytest
from google.protobuf.json_format import MessageToDict

from leyline.v1 import enums_pb2 as e
from tolaria.reference.decisions import Cull, Decision, Fossilize, Germinate, Retreat, ScaleLearningRate, command_for


@pytest.mark.parametrize(
    ("decision", "command_type", "payload"),
    [
        (
            Germinate("lora", "why"),
            e.COMMAND_SEED,
            {"seedOperation": {"operation": "SEED_OP_GERMINATE", "blueprintId": "lora"}},
        ),
        (
            Fossilize("s", "why"),
            e.COMMAND_SEED,
            {"targetSeedId": "s", "seedOperation": {"operation": "SEED_OP_FOSSILIZE"}},
        ),
        (Cull("s", "why"), e.COMMAND_SEED, {"targetSeedId": "s", "seedOperation": {"operation": "SEED_OP_CULL"}}),
        (
            ScaleLearningRate(0.5, "why"),
            e.COMMAND_OPTIMIZER,
            {"optimizerAdjustment": {"hyperparameters": {"lr_factor": 0.5}}},
        ),
        (Retreat("why"), e.COMMAND_ROLLBACK, {"rollbackPayload": {"tier": "fast", "reason": "why"}}),
    ],
)
def test_commands(decision: Decision, command_type: int, payload: dict[str, object]) -> None:
    """Every decision becomes a command of version 1 with its type, payload and reason, and whence and when it comes."""
    command = command_for(decision, command_id="c", issued_at_ns=1_500_000_000_123_000_000, deadline_ms=700)
    assert command_type == command.command_type
    fields = MessageToDict(command)
    del fields["commandType"]
    assert fields == {
        "version": 1,
        "commandId": "c",
        "executionDeadlineMs": 700,
        "issuedAt": "2017-07-14T02:40:00.123Z",
        "issuedBy": "tamiyo-reference",
        "annotations": {"reason": "why"},
        **payload,
    }
