"""The changes that an operator can ask of a running service. Must not know how a call is made."""

from __future__ import annotations

import typer

from leyline.v1.admin_service_pb2 import PauseTrainingRequest, ResumeTrainingRequest, StopTrainingRequest
from tolaria.cli.change import changing

changes = typer.Typer()


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
    """End the run for good, after the step that is being done."""
    return StopTrainingRequest()
