"""The changes that an operator can ask of a running service. Must not know how a call is made."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated

import typer

from leyline.v1.admin_service_pb2 import (
    AdjustLearningRateRequest,
    PauseTrainingRequest,
    ResumeTrainingRequest,
    SetConservativeModeRequest,
    StopTrainingRequest,
)
from tolaria.cli.change import changing

changes = typer.Typer()


def _finite(number: float | None) -> float | None:
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"{number} is no finite number")
    return number


def _positive(number: float | None) -> float | None:
    if number is not None and not number > 0:
        raise typer.BadParameter(f"{number} is not above 0")
    return _finite(number)


@changing(changes, lambda admin: admin.PauseTraining)
def pause() -> PauseTrainingRequest:
    """Hold training at the next microbatch, until it is resumed."""
    return PauseTrainingRequest()


@changing(changes, lambda admin: admin.ResumeTraining)
def resume() -> ResumeTrainingRequest:
    """Go on with training that is held."""
    return ResumeTrainingRequest()


@changing(changes, lambda admin: admin.StopTraining)
def stop() -> StopTrainingRequest:
    """End the run for good, after the step that is being done; the service goes on answering."""
    return StopTrainingRequest()


class Switch(StrEnum):
    """On or off."""

    ON = "on"
    OFF = "off"


@changing(changes, lambda admin: admin.SetConservativeMode)
def conservative(
    switch: Annotated[Switch, typer.Argument(help="on: leave seeds and the controller alone; off: no longer.")],
) -> SetConservativeModeRequest:
    """Switch conservative mode: training goes on, seeds and the controller are left alone."""
    return SetConservativeModeRequest(enabled=switch is Switch.ON)


@changing(changes, lambda admin: admin.AdjustLearningRate)
def lr(
    factor: Annotated[float | None, typer.Option(callback=_positive, help="Multiply the rate by this.")] = None,
    value: Annotated[
        float | None, typer.Option(callback=_finite, help="Set the rate to this, in place of its schedule.")
    ] = None,
    group: Annotated[
        str, typer.Option(help="Param group, such as host or seed:seed-1 (default: all that train).")
    ] = "",
    for_steps: Annotated[int, typer.Option(min=0, help="Updates until it wears off (default: it stays).")] = 0,
) -> AdjustLearningRateRequest:
    """Change learning rates at the next fence, by --factor or --value."""
    if (factor is None) == (value is None):
        raise typer.BadParameter("give --factor or --value, one of them")
    request = AdjustLearningRateRequest(group=group, expires_after_steps=for_steps)
    if factor is not None:
        request.factor = factor
    if value is not None:
        request.value = value
    return request
