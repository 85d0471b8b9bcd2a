from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from leyline.v1 import enums_pb2 as e
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.reference.history import RunHistory
from tolaria.reference.policy import decide_epoch
from tolaria.reference.tamiyo import command_for

PLATEAU = [0.5] * 4
PROBATION = [e.SEED_STAGE_BLENDING, *[e.SEED_STAGE_PROBATIONARY] * 4]


def command_after(losses: list[float], stages: list[Any] | None, accuracy: float) -> dict[str, Any]:
    """Returns the command for the last of some epochs, as a dictionary without its reason."""
    history, decision = RunHistory(), None
    for epoch, loss in enumerate(losses, 1):
        seeds = [SeedState(seed_id="s", stage=stages[epoch - 1], age_epochs=9)] if stages else []
        state = SystemStatePacket(
            current_epoch=epoch,
            global_step=epoch * 100,
            training_loss=loss,
            validation_loss=0.5 if stages is None and len(set(losses)) == 1 else 1 / epoch,
            validation_accuracy=0.9 if epoch == 1 else accuracy,
            seed_states=seeds,
        )
        history, decision = decide_epoch(history, state)
    assert decision is not None
    command = command_for(decision, command_id="c", issued_at_ns=1_500_000_000_123_000_000)
    fields: dict[str, Any] = MessageToDict(command)
    reason = fields["annotations"].pop("reason")
    assert reason
    return fields


FALLING = [1 / n for n in range(1, 6)]


@pytest.mark.parametrize(
    ("losses", "stages", "accuracy", "payload"),
    [
        (
            PLATEAU,
            None,
            0.9,
            {
                "commandType": "COMMAND_SEED",
                "seedOperation": {"operation": "SEED_OP_GERMINATE", "blueprintId": "residual_mlp"},
            },
        ),
        (
            FALLING,
            PROBATION,
            0.9,
            {"commandType": "COMMAND_SEED", "targetSeedId": "s", "seedOperation": {"operation": "SEED_OP_FOSSILIZE"}},
        ),
        (
            FALLING,
            PROBATION,
            0.5,
            {"commandType": "COMMAND_SEED", "targetSeedId": "s", "seedOperation": {"operation": "SEED_OP_CULL"}},
        ),
        (
            [1.0, 0.8, 1.1, 0.9, 1.2],
            None,
            0.9,
            {
                "commandType": "COMMAND_OPTIMIZER",
                "optimizerAdjustment": {"hyperparameters": {"lr_factor": 0.5, "lr_expires_after_steps": 1000.0}},
            },
        ),
    ],
    ids=["germinate", "fossilize", "cull", "lower rates"],
)
def test_commands(losses: list[float], stages: list[Any] | None, accuracy: float, payload: dict[str, Any]) -> None:
    """Each decision becomes a command of version 1 with its type, payload, reason, issuer and time."""
    assert command_after(losses, stages, accuracy) == {
        "version": 1,
        "commandId": "c",
        "executionDeadlineMs": 30_000,
        "issuedAt": "2017-07-14T02:40:00.123Z",
        "issuedBy": "tamiyo-reference",
        "annotations": {},
        **payload,
    }
