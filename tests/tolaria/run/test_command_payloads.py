from __future__ import annotations

import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_OPTIMIZER
from support.peers import command
from tolaria.errors import CommandRejectedError
from tolaria.run.command_handler import optimizer_change


def optimizer_command(group: str = "", /, **hyperparameters: float) -> AdaptationCommand:
    """Returns a COMMAND_OPTIMIZER with these hyperparameters."""
    made = command(COMMAND_OPTIMIZER)
    made.optimizer_adjustment.optimizer_id = group
    made.optimizer_adjustment.hyperparameters.update(hyperparameters)
    return made


def test_rates_go_to_the_controller_and_the_rest_to_the_optimizer() -> None:
    """lr, lr_factor and their expiry are one adjustment; other names are hyperparameters; the group is for both."""
    asked = optimizer_command("host", lr_factor=0.5, lr_expires_after_steps=10, weight_decay=0.25)
    change = optimizer_change(asked)
    adjustment = change.adjustment
    assert adjustment is not None
    assert (adjustment.group, adjustment.factor, adjustment.expires_after_steps) == ("host", 0.5, 10)
    assert (adjustment.origin, adjustment.request_id) == ("tamiyo", asked.command_id)
    assert (change.hyperparameters, change.group) == ({"weight_decay": 0.25}, "host")


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {},
        {"lr": 0.1, "lr_factor": 0.5},
        {"lr_factor": 0.0},
        {"lr": -1.0},
        {"lr_expires_after_steps": 5},
        {"lr_expires_after_steps": 5, "momentum": 0.5},
    ],
)
def test_what_makes_no_sense_is_malformed(hyperparameters: dict[str, float]) -> None:
    """Nothing at all, both ways at once, invalid rates: rejected before the lane gets a command."""
    with pytest.raises(CommandRejectedError, match="malformed"):
        optimizer_change(optimizer_command(**hyperparameters))
