from __future__ import annotations

import pytest

from leyline.v1.admin_service_pb2 import AdjustLearningRateRequest
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_OPTIMIZER
from support.peers import command
from tolaria.errors import AdjustmentRefusedError, CommandRejectedError
from tolaria.training.commands import operators_adjustment, optimizer_change


def optimizer_command(group: str = "", /, **hyperparameters: float) -> AdaptationCommand:
    """COMMAND_OPTIMIZER with these hyperparameters."""
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
    """Nothing at all, both ways at once, rates that are none: refused before the lane hears of it."""
    with pytest.raises(CommandRejectedError, match="malformed"):
        optimizer_change(optimizer_command(**hyperparameters))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "factor"),
        ({"factor": 0.0}, "factor"),
        ({"factor": float("nan")}, "factor"),
        ({"value": -1.0}, "value"),
        ({"value": float("inf")}, "value"),
    ],
)
def test_an_operators_nonsense_names_the_field(fields: dict[str, float], field: str) -> None:
    """What an operator asks is checked field by field."""
    with pytest.raises(AdjustmentRefusedError) as caught:
        operators_adjustment(AdjustLearningRateRequest(request_id="1", reason="x", **fields))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_an_operators_wish_is_taken_whole() -> None:
    """Group, value, expiry, id and reason arrive; an empty group means all."""
    adjustment = operators_adjustment(
        AdjustLearningRateRequest(request_id="1", reason="calm", value=0.01, expires_after_steps=7)
    )
    assert (adjustment.group, adjustment.value, adjustment.factor, adjustment.expires_after_steps) == (
        None,
        0.01,
        None,
        7,
    )
    assert (adjustment.origin, adjustment.request_id, adjustment.reason) == ("operator", "1", "calm")
