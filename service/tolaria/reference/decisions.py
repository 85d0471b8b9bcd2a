"""What the reference Tamiyo can decide, and the command that says it. Must not judge; `reason` is for people only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from leyline.v1.commands_pb2 import AdaptationCommand, CommandOptimizerAdjustment, CommandSeedOperation
from leyline.v1.enums_pb2 import (
    COMMAND_OPTIMIZER,
    COMMAND_ROLLBACK,
    COMMAND_SEED,
    SEED_OP_CULL,
    SEED_OP_FOSSILIZE,
    SEED_OP_GERMINATE,
)

ISSUER = "tamiyo-reference"


@dataclass(frozen=True, slots=True)
class Germinate:
    """Graft a new seed of this blueprint."""

    blueprint_id: str
    reason: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class Fossilize:
    """Make a seed part of the host."""

    seed_id: str
    reason: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class Cull:
    """Take a seed out again."""

    seed_id: str
    reason: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class ScaleLearningRate:
    """Multiply every learning rate."""

    factor: float
    reason: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class Retreat:
    """Roll back to a snapshot in memory."""

    reason: str


Decision: TypeAlias = Germinate | Fossilize | Cull | ScaleLearningRate | Retreat


def command_for(decision: Decision, *, command_id: str, issued_at_ns: int, deadline_ms: int) -> AdaptationCommand:
    """The unsigned command for a decision, its reason among the annotations.

    `issued_at_ns` is Unix time; `deadline_ms` counts from it.
    """
    issued_at = Timestamp()
    issued_at.FromNanoseconds(issued_at_ns)
    command = AdaptationCommand(
        version=1,
        command_id=command_id,
        execution_deadline_ms=deadline_ms,
        issued_at=issued_at,
        issued_by=ISSUER,
        annotations={"reason": decision.reason},
    )
    command.MergeFrom(_payload(decision))
    return command


def _payload(decision: Decision) -> AdaptationCommand:
    match decision:
        case Germinate(blueprint_id=blueprint_id):
            operation = CommandSeedOperation(operation=SEED_OP_GERMINATE, blueprint_id=blueprint_id)
            return AdaptationCommand(command_type=COMMAND_SEED, seed_operation=operation)
        case Fossilize(seed_id=seed_id):
            operation = CommandSeedOperation(operation=SEED_OP_FOSSILIZE)
            return AdaptationCommand(command_type=COMMAND_SEED, target_seed_id=seed_id, seed_operation=operation)
        case Cull(seed_id=seed_id):
            operation = CommandSeedOperation(operation=SEED_OP_CULL)
            return AdaptationCommand(command_type=COMMAND_SEED, target_seed_id=seed_id, seed_operation=operation)
        case ScaleLearningRate(factor=factor):
            adjustment = CommandOptimizerAdjustment(hyperparameters={"lr_factor": factor})
            return AdaptationCommand(command_type=COMMAND_OPTIMIZER, optimizer_adjustment=adjustment)
        case Retreat(reason=reason):
            payload = Struct()
            payload.update({"tier": "fast", "reason": reason})
            return AdaptationCommand(command_type=COMMAND_ROLLBACK, rollback_payload=payload)
        case _ as never:
            assert_never(never)
