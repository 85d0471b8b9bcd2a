"""The changes that an operator can ask of a running service.

Must not know how a call is made, nor how answers are worded that need more than their fields.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated

import typer

from leyline.v1.admin_service_pb2 import (
    AdjustLearningRateRequest,
    CaptureProfileRequest,
    CreateCheckpointRequest,
    PauseTrainingRequest,
    ResumeTrainingRequest,
    SetConservativeModeRequest,
    StopTrainingRequest,
    TriggerRollbackRequest,
)
from leyline.v1.enums_pb2 import RollbackTier
from tolaria.cli.answers import digests_equal, show_checkpoint, show_profile, show_rollback
from tolaria.cli.change import Telling, changing

changes = typer.Typer()

ROLLBACK_TIMEOUT_S = 30.0  # rollback.full_budget_s is 12, and a fence has to come first
CHECKPOINT_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0  # a last checkpoint is written first
PROFILE_TIMEOUT_S = 900.0  # however slow the steps are

_UINT32_MAX = 2**32 - 1
_UINT64_MAX = 2**64 - 1


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


@changing(changes, lambda admin: admin.StopTraining, timeout_s=STOP_TIMEOUT_S)
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
    for_steps: Annotated[
        int, typer.Option(min=0, max=_UINT64_MAX, help="Updates until it wears off (default: it stays).")
    ] = 0,
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


class Tier(StrEnum):
    """From where a rollback takes the state."""

    FAST = "fast"
    FULL = "full"
    AUTO = "auto"

    @property
    def number(self) -> RollbackTier.ValueType:
        """The contract's value."""
        if self is Tier.AUTO:
            return RollbackTier.ROLLBACK_TIER_UNSPECIFIED
        return RollbackTier.Value(f"ROLLBACK_TIER_{self.name}")


@changing(
    changes,
    lambda admin: admin.TriggerRollback,
    timeout_s=ROLLBACK_TIMEOUT_S,
    telling=Telling(show_rollback, prove=digests_equal),
)
def rollback(
    tier: Annotated[
        Tier, typer.Option(help="fast: from memory; full: from disk; auto: the service decides.")
    ] = Tier.AUTO,
    step: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=_UINT64_MAX,
            help="Back to the nearest restore point at or before this step (default: the last stable one).",
        ),
    ] = None,
) -> TriggerRollbackRequest:
    """Bring back an earlier state of training, proved by its digest, and go on from there."""
    return TriggerRollbackRequest(tier=tier.number, target_step=step)


@changing(
    changes, lambda admin: admin.CreateCheckpoint, timeout_s=CHECKPOINT_TIMEOUT_S, telling=Telling(show_checkpoint)
)
def checkpoint() -> CreateCheckpointRequest:
    """Write a checkpoint now, and wait until it is on the disk; training goes on meanwhile."""
    return CreateCheckpointRequest()


@changing(changes, lambda admin: admin.CaptureProfile, timeout_s=PROFILE_TIMEOUT_S, telling=Telling(show_profile))
def profile(
    steps: Annotated[
        int, typer.Option(min=0, max=_UINT32_MAX, help="Updates to trace (default: profiler.active_steps).")
    ] = 0,
) -> CaptureProfileRequest:
    """Trace the next updates, and tell where the trace is."""
    return CaptureProfileRequest(active_steps=steps)
