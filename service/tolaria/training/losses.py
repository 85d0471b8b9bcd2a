"""Asks a job for its losses and checks what comes back. Must not know what is done with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from tolaria.errors import LossShapeError
from tolaria.gradients import losses_by_source
from tolaria.jobs import HOST, Batch, PerSampleLosses, TrainingJob


def checked_losses(job: TrainingJob, model: nn.Module, batch: Batch, seeds: Sequence[str]) -> Mapping[str, Tensor]:
    """The job's losses by source, each a scalar tensor with a graph, the host's among them.

    Losses by sample are split by the batch's `seed_ids`; samples of seeds that are not among `seeds` are the host's,
    and a source without a sample has no loss.

    Raises:
        LossShapeError: naming the source whose loss is something else.
    """
    losses: object = job.losses(model, batch)
    if isinstance(losses, PerSampleLosses):
        return _split(losses, batch, seeds)
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


def _split(losses: PerSampleLosses, batch: Batch, seeds: Sequence[str]) -> Mapping[str, Tensor]:
    if batch.seed_ids is None:
        raise LossShapeError("losses() returned losses by sample for a batch without seed_ids")
    if not losses.values.requires_grad:
        raise LossShapeError("the losses by sample carry no graph: were they detached?")
    return losses_by_source(losses.values, batch.seed_ids, [HOST, *seeds])
