"""One training step: microbatches, losses, gradients, clipping, learning rates, optimizer.

The only place that changes parameters. Synchronises with the device once, for the loss and the gradient norms, which
have to be known before anything changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import torch
from torch import Tensor, nn

from tolaria.errors import LossShapeError
from tolaria.gradients import losses_by_source
from tolaria.jobs import HOST, Batch, PerSampleLosses, TrainingJob
from tolaria.lane.device import on_device
from tolaria.lane.messages import StepDone
from tolaria.lane.profiling import Mark, unmarked
from tolaria.lane.train_module import TrainModule
from tolaria.values.optimization import LearningRateViolation

_HALF: Final = frozenset({torch.float16, torch.bfloat16})
"""Dtypes in which the norms of ordinary gradients overflow."""


class StepAbandonedError(Exception):
    """A step or an evaluation is abandoned before its end; no parameter has changed."""


@dataclass(slots=True)
class _Taken:
    """Sums over the microbatches of one step."""

    samples: int = 0
    planned_samples: int = 0
    waited_s: float = 0.0
    loss: Tensor | None = None


def train_step(module: TrainModule, continue_step: Callable[[], bool], mark: Mark = unmarked) -> StepDone | None:
    """Sums the gradients of the microbatches and updates the parameters; skips the step if anything is not finite.

    Returns None when the epoch has no batch left. `continue_step` is called between two microbatches and may block.

    Raises:
        StepAbandonedError: `continue_step` returned False; the same step can start again.
        LossShapeError: the job returns an invalid loss.
    """
    started_s = time.monotonic()
    first_batch = module.progress.batches
    taken = _take_microbatches(module, continue_step, mark)
    if taken.loss is None:
        return None
    with mark("merge"):
        module.merger.finish()
        _rescale(module, taken)
    loss, norms = _measure(taken.loss, module)
    norm = norms[0]
    finite = math.isfinite(loss) and math.isfinite(norm)
    violations: list[LearningRateViolation] = []
    if finite:
        with mark("optimizer"):
            _clip(module, norms)
            violations = module.seeds.controller.before_step(module.global_step)
            module.optimizer.step()
        module.global_step += 1
    else:
        module.discard_pass()
    rescaled = module.fast_paths.update_scale(finite=finite, loss_finite=math.isfinite(loss))
    module.progress = module.progress.after_step(loss, taken.samples, skipped=not finite)
    finished_s = time.monotonic()
    return StepDone(
        global_step=module.global_step,
        epoch=module.progress.number,
        loss=loss,
        gradient_norm=norm,
        samples=taken.samples,
        duration_s=finished_s - started_s,
        input_wait_s=taken.waited_s,
        finished_at_s=finished_s,
        skipped=not finite,
        violations=tuple(violations),
        rescaled=rescaled,
        batches=range(first_batch, module.progress.batches),
    )


def checked_losses(job: TrainingJob, model: nn.Module, batch: Batch, seeds: Sequence[str]) -> Mapping[str, Tensor]:
    """Returns the job's losses by source, each a scalar with a graph; the host has one.

    Per-sample losses are split by the batch's `seed_ids`. Samples of seeds that are not in `seeds` count as the
    host's, and a source without a sample has no loss. Raises LossShapeError with the source of an invalid loss.
    """
    losses: object = job.losses(model, batch)
    if isinstance(losses, PerSampleLosses):
        if batch.seed_ids is None:
            raise LossShapeError("losses() returned losses by sample for a batch without seed_ids")
        if not losses.values.requires_grad:
            raise LossShapeError("the losses by sample carry no graph: were they detached?")
        return losses_by_source(losses.values, batch.seed_ids, [HOST, *seeds])
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


def _take_microbatches(module: TrainModule, continue_step: Callable[[], bool], mark: Mark) -> _Taken:
    """Takes up to `accumulate` microbatches, each fetched when it is needed; gradients are weighted by samples."""
    taken = _Taken()
    for number in range(module.accumulate):
        if number and not continue_step():
            module.abandon_step()
            raise StepAbandonedError
        asked_s = time.monotonic()
        if not number:
            module.note_step_start()
        with mark("input"):
            batch = module.next_batch()
        if batch is None:
            break
        batch = on_device(batch, module.device, pinned=module.fast_paths.pins_memory)
        taken.waited_s += time.monotonic() - asked_s
        if not number:
            module.clear_gradients()
            module.save_buffers()
            taken.planned_samples = batch.samples * module.accumulate
            module.merger.begin(module.global_step, module.accumulate)
        with mark("forward"), module.fast_paths.autocast():
            losses = checked_losses(module.job, module.model, batch, module.seeds.topology.training_seeds)
        share = batch.samples / taken.planned_samples
        with mark("backward"):
            loss = module.merger.add(losses, batch, share=share, scaler=module.fast_paths.scaler)
        taken.loss = loss if taken.loss is None else taken.loss + loss
        taken.samples += batch.samples
    return taken


def _rescale(module: TrainModule, taken: _Taken) -> None:
    """Divides by the actual samples where fewer came than planned, as at an epoch's end, and by float16's loss scale.

    Gradients that overflowed are infinite afterwards.
    """
    if module.fast_paths.scaler is not None:
        module.fast_paths.scaler.unscale_(module.optimizer)
    if taken.samples != taken.planned_samples and taken.loss is not None:
        factor = taken.planned_samples / taken.samples
        taken.loss = taken.loss * factor
        gradients = [p.grad for p in module.parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)


def _measure(loss: Tensor, module: TrainModule) -> tuple[float, list[float]]:
    """Returns the loss and the gradient norm (L2) of each clip group. Synchronises.

    An isolated seed is a clip group by itself and cannot affect the host: if its norm is not finite, its gradients
    are dropped.
    """
    groups = [[p.grad for p in group if p.grad is not None] for group in module.clip_groups]
    gradients = [gradient for group in groups for gradient in group]
    if not gradients:  # no sample of this step is for a parameter in the optimizer
        return loss.item(), [0.0] * len(groups)
    # All gradients are on one device, so the grouping that torch.nn.utils.get_total_norm does first is not needed: on
    # small models it costs as much as an operation of the model.
    half = any(gradient.dtype in _HALF for gradient in gradients)
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32 if half else None)  # noqa: SLF001 - torch's name for the batched norm
    # One transfer: the loss and the norm of each gradient; their root sum of squares is cheaper on the host.
    values: list[float] = torch.stack([loss.to(norms[0].dtype), *(n.to(norms[0].dtype) for n in norms)]).tolist()
    rest = iter(values[1:])
    found = [math.hypot(*islice(rest, len(group))) for group in groups]
    for parameters, norm in zip(module.clip_groups[1:], found[1:], strict=True):
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
    return values[0], found


def _clip(module: TrainModule, norms: list[float]) -> None:
    """Scales each group's gradients to a norm of at most `clip_norm` (Pascanu et al. 2013, algorithm 1)."""
    if not module.clip_norm:
        return
    for group, norm in zip(module.clip_groups, norms, strict=True):
        gradients = [p.grad for p in group if p.grad is not None]
        if norm > module.clip_norm and gradients:
            torch._foreach_mul_(gradients, module.clip_norm / norm)
