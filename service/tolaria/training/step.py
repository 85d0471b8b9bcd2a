"""One optimizer update, top to bottom. Runs in the lane; the only place that changes parameters.

Synchronises with the device once: for the loss and the gradient norm, which must be known before anything changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tolaria.jobs import Batch
from tolaria.optimization import Violation
from tolaria.training.losses import checked_losses
from tolaria.training.reports import StepReport
from tolaria.training.rig import Rig, on_device


class StepAbandonedError(Exception):
    """Raised out of a step that the lane was told to give up; no parameter has changed."""


def train_step(rig: Rig, epoch: int, pass_microbatch: Callable[[], bool]) -> StepReport | None:
    """Take microbatches, sum their gradients, and update the parameters, unless something is not finite.

    Args:
        rig: what to work on; its `global_step` counts up unless the step is void.
        epoch: for the report.
        pass_microbatch: asked before each microbatch; may wait; False gives the step up.

    Returns:
        The step's report; None when the epoch has no batch left.

    Raises:
        StepAbandonedError: when `pass_microbatch` said so.
    """
    started_s = time.monotonic()
    batches = _take_microbatches(rig)
    if not batches:
        return None
    waited_s = time.monotonic() - started_s

    optimizer = rig.optimizer
    optimizer.zero_grad(set_to_none=True)
    rig.merger.begin(rig.global_step, len(batches))
    total_loss: Tensor | None = None
    for batch in batches:
        if not pass_microbatch():
            optimizer.zero_grad(set_to_none=True)
            raise StepAbandonedError
        with rig.paths.autocast():
            losses = checked_losses(rig.job, rig.model, batch, rig.growth.topology.training_seeds)
        loss = rig.merger.add(losses, batch, scaler=rig.paths.scaler)
        total_loss = loss if total_loss is None else total_loss + loss
    rig.merger.finish()
    _unscale(rig)
    loss_value, norm = _measure(total_loss, rig)

    finite = math.isfinite(loss_value) and math.isfinite(norm)
    violations: list[Violation] = []
    if finite:
        _clip(rig, norm)
        violations = rig.growth.controller.before_step(rig.global_step)
        optimizer.step()
        rig.global_step += 1
    if rig.paths.scaler is not None:
        rig.paths.scaler.update()
    finished_s = time.monotonic()
    return StepReport(
        global_step=rig.global_step,
        epoch=epoch,
        loss=loss_value,
        gradient_norm=norm,
        samples=sum(batch.samples for batch in batches),
        duration_s=finished_s - started_s,
        input_wait_s=waited_s,
        finished_at_s=finished_s,
        void=not finite,
        violations=tuple(violations),
        rescaled=not finite and math.isfinite(loss_value) and rig.paths.scaler is not None,
    )


def _take_microbatches(rig: Rig) -> list[Batch]:
    batches: list[Batch] = []
    while len(batches) < rig.accumulate and (batch := rig.cursor.next_batch()) is not None:
        batches.append(on_device(batch, rig.device))
    return batches


def _unscale(rig: Rig) -> None:
    """Undo the loss scale of float16 in the gradients; those that overflowed are infinite now."""
    if rig.paths.scaler is not None:
        rig.paths.scaler.unscale_(rig.optimizer)


def _measure(loss: Tensor | None, rig: Rig) -> tuple[float, float]:
    """Loss and total gradient norm (L2, over all parameters) as numbers."""
    gradients = [p.grad for p in rig.parameters if p.grad is not None]
    if loss is None or not gradients:
        return float("nan"), float("nan")
    # All gradients are on one device, so the grouping that torch.nn.utils.get_total_norm does first is not needed: on
    # small models it costs as much as an operation of the model.
    norms = torch._foreach_norm(gradients, 2, dtype=_norm_dtype(gradients))  # noqa: SLF001 - torch's name for the batched norm
    # One transfer: the loss and the norm of each gradient; their root sum of squares costs less here than there.
    values: list[float] = torch.stack([loss.to(norms[0].dtype), *norms]).tolist()
    return values[0], math.hypot(*values[1:])


def _norm_dtype(gradients: list[Tensor]) -> torch.dtype | None:
    """Half precision overflows at norms that are no mistake; None is the gradients' own dtype."""
    return torch.float32 if gradients[0].dtype in {torch.float16, torch.bfloat16} else None


def _clip(rig: Rig, norm: float) -> None:
    """Scale gradients so that their norm is at most `clip_norm` (Pascanu et al. 2013, algorithm 1)."""
    if rig.clip_norm and norm > rig.clip_norm:
        gradients = [p.grad for p in rig.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, rig.clip_norm / norm)
