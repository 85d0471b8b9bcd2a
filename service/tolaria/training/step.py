"""One optimizer update, top to bottom. Runs in the lane; the only place that changes parameters.

Synchronises with the device once: for the loss and the gradient norms, which must be known before anything changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tolaria.training.losses import checked_losses
from tolaria.training.profiling import Mark, unmarked
from tolaria.training.reports import StepReport
from tolaria.training.rig import Rig, on_device
from tolaria.values.optimization import LearningRateViolation


class StepAbandonedError(Exception):
    """Raised out of a step that the lane was told to give up; no parameter has changed."""


@dataclass(slots=True)
class _Taken:
    """What the microbatches of one update came to."""

    microbatches: int = 0
    samples: int = 0
    planned_samples: int = 0
    waited_s: float = 0.0
    loss: Tensor | None = None


def train_step(rig: Rig, pass_microbatch: Callable[[], bool], mark: Mark = unmarked) -> StepReport | None:
    """Take microbatches, sum their gradients, and update the parameters, unless something is not finite.

    Args:
        rig: what to work on; its `global_step` counts up unless the step is void.
        pass_microbatch: asked between two microbatches; may wait; False gives the step up, so that it can be done anew.
        mark: marks forward, backward, merge and optimizer for a profile.

    Returns:
        The step's report; None when the epoch has no batch left.

    Raises:
        StepAbandonedError: when `pass_microbatch` said so.
    """
    started_s = time.monotonic()
    first_batch = rig.epoch.batches
    taken = _take_microbatches(rig, pass_microbatch, mark)
    if taken.loss is None:
        return None
    with mark("merge"):
        rig.merger.finish()
        _make_up_for_missing_samples(rig, taken)
    loss, norms = _measure(taken.loss, rig)

    norm = norms[0]
    finite = math.isfinite(loss) and math.isfinite(norm)
    violations: list[LearningRateViolation] = []
    if finite:
        with mark("optimizer"):
            _clip(rig, norms)
            violations = rig.growth.controller.before_step(rig.global_step)
            rig.optimizer.step()
        rig.global_step += 1
    else:
        rig.clear_gradients()
        rig.put_buffers_back()
    rescaled = rig.paths.lowered_scale(finite=finite, loss_finite=math.isfinite(loss))
    rig.epoch.count(loss, taken.samples, void=not finite)
    finished_s = time.monotonic()
    return StepReport(
        global_step=rig.global_step,
        epoch=rig.epoch.number,
        loss=loss,
        gradient_norm=norm,
        samples=taken.samples,
        duration_s=finished_s - started_s,
        input_wait_s=taken.waited_s,
        finished_at_s=finished_s,
        void=not finite,
        violations=tuple(violations),
        rescaled=rescaled,
        batches=range(first_batch, rig.epoch.batches),
    )


def _take_microbatches(rig: Rig, pass_microbatch: Callable[[], bool], mark: Mark) -> _Taken:
    """Up to `accumulate` microbatches, each fetched when it is its turn; their gradients weigh by samples."""
    taken = _Taken()
    while taken.microbatches < rig.accumulate:
        if taken.microbatches and not pass_microbatch():
            rig.give_update_up()
            raise StepAbandonedError
        asked_s = time.monotonic()
        if not taken.microbatches:
            rig.note_place()
        batch = rig.next_batch()
        if batch is None:
            break
        batch = on_device(batch, rig.device, pinned=rig.paths.pins)
        taken.waited_s += time.monotonic() - asked_s
        if not taken.microbatches:
            rig.clear_gradients()
            rig.keep_buffers()
            taken.planned_samples = batch.samples * rig.accumulate
            rig.merger.begin(rig.global_step, rig.accumulate)
        with mark("forward"), rig.paths.autocast():
            losses = checked_losses(rig.job, rig.model, batch, rig.growth.topology.training_seeds)
        share = batch.samples / taken.planned_samples
        with mark("backward"):
            loss = rig.merger.add(losses, batch, share=share, scaler=rig.paths.scaler)
        taken.loss = loss if taken.loss is None else taken.loss + loss
        taken.microbatches += 1
        taken.samples += batch.samples
    return taken


def _make_up_for_missing_samples(rig: Rig, taken: _Taken) -> None:
    """Gradients are means over the samples planned for; where fewer came, as at an epoch's end, scale to the real mean.

    Also undoes the loss scale of float16; gradients that overflowed are infinite now.
    """
    if rig.paths.scaler is not None:
        rig.paths.scaler.unscale_(rig.optimizer)
    if taken.samples != taken.planned_samples and taken.loss is not None:
        factor = taken.planned_samples / taken.samples
        taken.loss = taken.loss * factor
        gradients = [p.grad for p in rig.parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)


def _measure(loss: Tensor, rig: Rig) -> tuple[float, list[float]]:
    """The loss, and the gradient norm (L2) of each of the rig's clip groups, as numbers.

    A seed that is isolated from the host is a group of its own, so that it can never move the host; where its norm is
    not finite its gradients are dropped.
    """
    groups = [[p.grad for p in group if p.grad is not None] for group in rig.clip_groups]
    gradients = [gradient for group in groups for gradient in group]
    if not gradients:  # a batch that is for nobody whom the optimizer holds
        return loss.item(), [0.0] * len(groups)
    # All gradients are on one device, so the grouping that torch.nn.utils.get_total_norm does first is not needed: on
    # small models it costs as much as an operation of the model.
    norms = torch._foreach_norm(gradients, 2, dtype=_norm_dtype(gradients))  # noqa: SLF001 - torch's name for the batched norm
    # One transfer: the loss and the norm of each gradient; their root sum of squares costs less here than there.
    values: list[float] = torch.stack([loss.to(norms[0].dtype), *(n.to(norms[0].dtype) for n in norms)]).tolist()
    found, place = [], 1
    for group in groups:
        found.append(math.hypot(*values[place : place + len(group)]))
        place += len(group)
    for parameters, norm in zip(rig.clip_groups[1:], found[1:], strict=True):
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
    return values[0], found


def _norm_dtype(gradients: list[Tensor]) -> torch.dtype | None:
    """Half precision overflows at norms that are no mistake; None is the gradients' own dtype."""
    halves = {torch.float16, torch.bfloat16}
    return torch.float32 if any(gradient.dtype in halves for gradient in gradients) else None


def _clip(rig: Rig, norms: list[float]) -> None:
    """Scale each group's gradients so that their norm is at most `clip_norm` (Pascanu et al. 2013, algorithm 1)."""
    if not rig.clip_norm:
        return
    for group, norm in zip(rig.clip_groups, norms, strict=True):
        gradients = [p.grad for p in group if p.grad is not None]
        if norm > rig.clip_norm and gradients:
            torch._foreach_mul_(gradients, rig.clip_norm / norm)
