"""Asks a job for its losses and checks what comes back. Must not know what is done with them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tolaria.errors import LossShapeError
from tolaria.jobs import HOST, Batch, TrainingJob


def checked_losses(job: TrainingJob, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """The job's losses by source, each a scalar tensor with a graph, the host's among them.

    Raises:
        LossShapeError: naming the source whose loss is something else.
    """
    losses: object = job.losses(model, batch)
    if not isinstance(losses, Mapping) or HOST not in losses:
        given = list(losses) if isinstance(losses, Mapping) else f"a {type(losses).__name__}"
        raise LossShapeError(f"losses() must return a mapping with the source {HOST!r}, got {given}")
    for source, loss in losses.items():
        if not isinstance(loss, Tensor):
            raise LossShapeError(f"the loss of source {source!r} must be a tensor, got a {type(loss).__name__}")
        if loss.ndim != 0:
            raise LossShapeError(f"the loss of source {source!r} must be a scalar, got shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise LossShapeError(f"the loss of source {source!r} carries no graph: was it detached?")
    return losses
