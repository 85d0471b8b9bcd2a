"""What a seed command must look like before a bed acts on it. Must not know which seeds there are."""

from __future__ import annotations

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_SEED
from tolaria.errors import IllegalMoveError

CONTRACT_VERSION = 1
NAME_LENGTH_MAX = 128
_BLENDING_STEPS_MAX = 10**9


def check_command(command: AdaptationCommand) -> None:
    """Refuse what is no seed command of this contract.

    Raises:
        IllegalMoveError: with what is wrong.
    """
    if not command.command_id:
        raise IllegalMoveError("the command has no command_id")
    if command.version != CONTRACT_VERSION:
        raise IllegalMoveError(f"the command has version {command.version}; known is {CONTRACT_VERSION}")
    if command.command_type != COMMAND_SEED or not command.HasField("seed_operation"):
        raise IllegalMoveError("only seed commands with a seed operation are carried out here")
    names = (command.command_id, command.target_seed_id, command.seed_operation.blueprint_id, slot_of(command))
    if max(map(len, names)) > NAME_LENGTH_MAX:
        raise IllegalMoveError(f"a name in the command is longer than {NAME_LENGTH_MAX} characters")


def slot_of(command: AdaptationCommand) -> str:
    """The slot that the command names; empty lets Tolaria's job take the first that is free."""
    return command.annotations.get("slot", "")


def blending_steps_of(command: AdaptationCommand, default: int) -> int:
    """Steps of the blending that the command asks for, else `default`.

    Raises:
        IllegalMoveError: on a number out of range, or on a parameter that has no meaning here.
    """
    parameters = command.seed_operation.parameters
    unknown = sorted(set(parameters) - {"blending_steps"})
    if unknown:
        raise IllegalMoveError(f"parameter {unknown[0][:NAME_LENGTH_MAX]!r} is unknown; known is blending_steps")
    steps = parameters["blending_steps"] if "blending_steps" in parameters else float(default)
    if not 1 <= steps <= _BLENDING_STEPS_MAX:
        raise IllegalMoveError(f"parameter blending_steps is {steps}, which is not from 1 to {_BLENDING_STEPS_MAX}")
    return int(steps)
