"""One training step: microbatches, losses, gradients, clipping, learning rates, optimizer.

The only place that changes parameters. Synchronises with the device once, for the loss and the gradient norms, which
have to be known before anything changes; with several microbatches on a CPU, also for the loss of each.

What is not finite is left out: a microbatch of several, or else the step, which is then *skipped* and changes nothing.
A step whose loss is finite but extreme among the recent ones is skipped too, if `health.skip_extreme` is on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final
from zlib import crc32

import torch
from torch import Tensor

from tolaria.jobs import Batch
from tolaria.lane.device import on_device
from tolaria.lane.job_output import checked_losses
from tolaria.lane.messages import StepDone
from tolaria.lane.parameter_check import essential_finite, is_extreme, parameters_sound
from tolaria.lane.profiling import Mark, unmarked
from tolaria.lane.rank_failures import ReportedError, agree_on_branches, reportable
from tolaria.lane.step_losses import StepLosses
from tolaria.lane.train_module import TrainModule
from tolaria.shards import local_parts
from tolaria.values.optimization import LearningRateViolation

_HALF: Final = frozenset({torch.float16, torch.bfloat16})
"""Dtypes in which the norms of ordinary gradients overflow."""


class StepAbandonedError(Exception):
    """A step or an evaluation is abandoned before its end; no parameter has changed."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """The losses and gradient norms of a step; `dropped` are isolated seeds whose gradients were not finite."""

    loss: float
    judged: float | None
    norms: Sequence[float]
    dropped: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norms[0])


def train_step(module: TrainModule, continue_step: Callable[[], bool], mark: Mark = unmarked) -> StepDone | None:
    """Sums the gradients of the microbatches and updates the parameters; leaves out what is not finite.

    Returns None when the epoch has no batch left. `continue_step` is called between two microbatches and may block.

    Raises:
        StepAbandonedError: `continue_step` returned False; the same step can start again.
        LossShapeError: the job returns an invalid loss.
        RanksDifferError: the ranks of a group are not at the same step of the same data.
        ReportedError: a pass has failed on this rank of a group.
        RankFailedError: a pass has failed on another one.
    """
    started_s = time.monotonic()
    module.logged.clear()  # of a step that was given up
    module.begin_on_rank()
    first_batch = module.progress.batches
    taken, measured = _take_and_measure(module, continue_step, mark)
    if measured is None:
        module.note_step_end()
        return None
    module.begin_announced_regimes()
    skipped = not measured.finite or _extreme(module, measured.judged)
    violations: list[LearningRateViolation] = []
    if skipped:
        module.discard_pass()
    else:
        violations = _update(module, measured, mark)
    module.broadcast_buffers()
    rescaled = taken.loss is not None and module.fast_paths.update_scale(
        finite=measured.finite, loss_finite=math.isfinite(measured.loss)
    )
    _record_loss(module, measured, skipped=skipped)
    module.progress = module.progress.after_step(measured.loss, taken.read, skipped=skipped)
    sound = None if rescaled else _check_parameters(module, taken, skipped=skipped)
    if not module.undone:
        sound, module.undone = False, True
    module.note_step_end()
    finished_s = time.monotonic()
    return StepDone(
        global_step=module.global_step,
        epoch=module.progress.number,
        loss=measured.loss,
        gradient_norm=measured.norms[0],
        samples=taken.read,
        duration_s=finished_s - started_s,
        input_wait_s=taken.waited_s,
        finished_at_s=finished_s,
        skipped=skipped,
        violations=tuple(violations),
        rescaled=rescaled,
        batches=range(first_batch, module.progress.batches),
        judged=measured.judged if measured.finite else None,
        left_out=() if skipped else tuple(taken.left_out),
        dropped_seeds=() if skipped else measured.dropped,
        parameters_finite=sound,
        logged=_logged(module, skipped=skipped),
        copy_s=taken.copied_s,
        learning_rate=next(iter(module.seeds.controller.learning_rates().values()), 0.0),
    )


def _logged(module: TrainModule, *, skipped: bool) -> dict[str, float]:
    """Returns what the job has logged during the step; nothing of a skipped one."""
    if skipped:
        module.logged.clear()
    return module.logged.take()


def _take_and_measure(
    module: TrainModule, continue_step: Callable[[], bool], mark: Mark
) -> tuple[StepLosses, _Measured | None]:
    """Takes the microbatches, and takes them again to find those that are not finite; None if there is no batch."""
    taken = _take_microbatches(module, continue_step, mark, each=module.device.type == "cpu")
    if not taken.read:
        if module.group is not None:  # an epoch ends for all of them
            with mark("merge"):
                taken.over_ranks(module, module.group)
        return taken, None
    measured = _finish(module, taken, mark)
    if measured.finite or module.accumulate == 1 or taken.loss is None or _overflowed(module, measured):
        return taken, measured
    module.abandon_step()
    module.logged.clear()
    module.fast_paths.keep_scale()
    taken = _take_microbatches(module, continue_step, mark, each=True, thorough=True)
    return taken, _finish(module, taken, mark)


def _update(module: TrainModule, measured: _Measured, mark: Mark) -> list[LearningRateViolation]:
    """Changes the parameters; returns the learning rates that other code had changed."""
    with mark("optimizer"):
        _clip(module, measured.norms)
        violations = module.seeds.controller.before_step(module.global_step)
        module.optimizer.step()
        module.seeds.controller.after_step()
        if module.averages is not None:
            module.averages.update()
    module.merger.applied()
    module.global_step += 1
    return violations


def _extreme(module: TrainModule, judged: float | None) -> bool:
    """Whether a step with this loss is skipped because it is extreme."""
    return judged is not None and is_extreme(module, judged, _losses_of(module))


def _record_loss(module: TrainModule, measured: _Measured, *, skipped: bool) -> None:
    """Adds a finite loss to the windows; that of a skipped step is extreme."""
    if not measured.finite:
        return
    if skipped and measured.judged is not None:
        module.losses.pass_over(measured.judged)
        return
    module.losses.note(measured.loss, measured.norms[0])
    if measured.judged is not None:
        module.losses.add(measured.judged)


def _read(module: TrainModule, taken: StepLosses, mark: Mark) -> tuple[Batch, Batch] | None:
    """Returns the next microbatch, as it was read, and this rank's share on its device; None at the end of the epoch.

    Adds the times of reading and copying to `taken`, without the wait for other ranks.
    """
    asked_s = time.monotonic()
    with mark("input"):
        read = module.next_batch()
    waited_s = time.monotonic() - asked_s
    module.compare_reading(read is not None)
    if read is None:
        return None
    asked_s = time.monotonic()
    own, began_s = module.training_share.of(read), time.monotonic()
    batch = on_device(own, module.device, pinned=module.fast_paths.pins_memory)
    taken.copied_s += time.monotonic() - began_s
    waited_s += time.monotonic() - asked_s
    taken.waited_s, module.waits.input_s = taken.waited_s + waited_s, module.waits.input_s + waited_s
    return read, batch


def _take_microbatches(
    module: TrainModule, continue_step: Callable[[], bool], mark: Mark, *, each: bool, thorough: bool = False
) -> StepLosses:
    """Takes up to `accumulate` microbatches, each fetched when it is needed; gradients are weighted by samples.

    With `each`, a microbatch of several whose loss is not finite is left out; with `thorough`, also one whose gradient
    is not finite.
    """
    taken = StepLosses()
    for number in range(module.accumulate):
        if number and not continue_step():
            module.abandon_step()
            raise StepAbandonedError
        if not number:
            module.note_step_start()
        place = module.progress.batches
        if (found := _read(module, taken, mark)) is None:
            break
        read, batch = found
        if not number:
            module.clear_gradients()
            taken.planned_samples = read.samples * module.accumulate
            module.merger.begin(module.global_step, module.accumulate)
        taken.read += read.samples
        taken.counted = module.training_share.counted(read)
        module.save_microbatch(gradients=thorough)
        losses = _forward(module, batch, taken, mark)
        if batch.seed_ids is None and module.group is not None:  # which alone compares them
            taken.sources = crc32(repr(tuple(losses)).encode(), taken.sources)
        counts = not (each and module.accumulate > 1) or module.on_all_ranks(essential_finite(module, losses))
        if not (counts and _backward(module, losses, batch, taken, mark, thorough=thorough)):
            module.discard_microbatch()
            taken.left_out.append(place)
        else:
            taken.last_batch = read
    return taken


def _report(module: TrainModule, taken: StepLosses, error: Exception, mark: Mark) -> None:
    """Has all ranks know, where that is possible, that a pass has failed on this one, and raises ReportedError."""
    if module.group is not None and reportable(module, error):
        with mark("merge"):
            taken.over_ranks(module, module.group, failed=True)
        raise ReportedError({}) from error


def _forward(module: TrainModule, batch: Batch, taken: StepLosses, mark: Mark) -> Mapping[str, Tensor]:
    """Returns the losses of a microbatch."""
    try:
        with mark("forward"), module.fast_paths.autocast(), module.seeds.groups_as_built():
            losses = checked_losses(module.job, module.model, batch, module.seeds.topology.training_seeds)
    except Exception as error:
        _report(module, taken, error, mark)
        raise
    if module.sharded:
        with mark("merge"):
            agree_on_branches(module)
    module.look_up_parameters()
    return losses


def _backward(
    module: TrainModule,
    losses: Mapping[str, Tensor],
    batch: Batch,
    taken: StepLosses,
    mark: Mark,
    *,
    thorough: bool,
) -> bool:
    """Adds the losses and gradients of a microbatch; returns False if it is not finite, which `thorough` finds out."""
    share, merger = taken.counted / taken.planned_samples, module.merger
    try:
        merger.prepare(losses, batch)
        if not thorough:
            taken.add(module, losses, batch)
        with mark("backward"):
            added = merger.add(losses, batch, share=share, scaler=module.fast_paths.scaler, finite_only=thorough)
    except Exception as error:
        _report(module, taken, error, mark)
        raise
    if not thorough:
        return True
    if not (added and module.gradients_finite()):
        return False
    taken.add(module, losses, batch)
    return True


def _finish(module: TrainModule, taken: StepLosses, mark: Mark) -> _Measured:
    """Merges the gradients, scales them by the samples that were taken, and measures them."""
    if module.group is not None:
        with mark("merge"):
            taken.over_ranks(module, module.group)
    if taken.loss is None:  # every microbatch was left out
        return _Measured(math.nan, None, [math.nan])
    with mark("merge"):
        module.merger.finish()
        if module.group is not None and not (module.merger.merges or module.sharded):
            taken.sum_gradients(module, module.group)
        _rescale(module, taken)
    return _measure(taken, module)


def _overflowed(module: TrainModule, measured: _Measured) -> bool:
    """Whether the loss scale of float16 may be the only cause of what is not finite."""
    scaler = module.fast_paths.scaler
    return scaler is not None and math.isfinite(measured.loss) and scaler.get_scale() > 1.0


def _rescale(module: TrainModule, taken: StepLosses) -> None:
    """Divides by the actual samples where fewer came than planned, as at an epoch's end, and by float16's loss scale.

    Gradients that overflowed are infinite afterwards.
    """
    if module.fast_paths.scaler is not None:
        module.fast_paths.scaler.unscale_(module.optimizer)
    if taken.samples not in {0, taken.planned_samples} and taken.loss is not None:
        factor = taken.planned_samples / taken.samples
        taken.loss = taken.loss * factor
        if taken.essential is not None:
            taken.essential = taken.essential * factor
        gradients = [p.grad for p in module.parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(local_parts(gradients), factor)


def _measure(taken: StepLosses, module: TrainModule) -> _Measured:
    """Returns the losses and the gradient norm (L2) of each clip group. Synchronises.

    An isolated seed is a clip group by itself and cannot affect the host: if its norm is not finite, its gradients
    are dropped.
    """
    groups = [[p.grad for p in group if p.grad is not None] for group in module.clip_groups]
    if module.sharded:
        groups = [local_parts(group) for group in groups]
    gradients = [gradient for group in groups for gradient in group] if len(groups) > 1 else groups[0]
    losses = [loss for loss in (taken.loss, taken.essential, taken.judged) if loss is not None]
    if not gradients:  # no sample of this step is for a parameter in the optimizer
        return _Measured(*_losses(taken, [loss.item() for loss in losses]), [0.0] * len(groups))
    # All gradients are on one device, so the grouping that torch.nn.utils.get_total_norm does first is not needed: on
    # small models it costs as much as an operation of the model.
    half = not _HALF.isdisjoint([gradient.dtype for gradient in gradients])
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32 if half else None)  # noqa: SLF001 - torch's name for the batched norm
    values = _transferred([*losses, *norms], norms[0].dtype, module.device)
    rest = iter(values[len(losses) :])
    found = module.norms_over_shards([math.hypot(*islice(rest, len(group))) for group in groups])
    if not module.isolated_seeds:
        return _Measured(*_losses(taken, values[: len(losses)]), found)
    dropped = []
    for seed_id, parameters, norm in zip(module.isolated_seeds, module.clip_groups[1:], found[1:], strict=True):
        if not math.isfinite(norm):
            dropped.append(seed_id)
            for parameter in parameters:
                parameter.grad = None
    return _Measured(*_losses(taken, values[: len(losses)]), found, tuple(dropped))


def _transferred(scalars: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> list[float]:
    """Returns losses and the norm of each gradient as numbers, in one transfer. Synchronises.

    The root sum of squares of the norms is cheaper on the host. On a CPU nothing is transferred, and reading one by one
    takes less than half of the time that stacking takes.
    """
    if device.type == "cpu":
        return [(each if each.dtype is dtype else each.to(dtype)).item() for each in scalars]
    values: list[float] = torch.stack([each.to(dtype) for each in scalars]).tolist()
    return values


def _losses(taken: StepLosses, values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the loss of the step and the one that is judged, of the values that were transferred."""
    rest = iter(values)
    loss = next(rest)
    if taken.essential is not None:
        essential = next(rest)
        loss = loss if math.isfinite(loss) else essential  # that of an isolated seed is not finite
    if taken.plain:
        return loss, loss
    judged = next(rest) / taken.judged_samples if taken.judged_samples else math.nan
    return loss, judged if math.isfinite(judged) else None


def _clip(module: TrainModule, norms: Sequence[float]) -> None:
    """Scales each group's gradients to a norm of at most `clip_norm` (Pascanu et al. 2013, algorithm 1)."""
    if not module.clip_norm:
        return
    for group, norm in zip(module.clip_groups, norms, strict=True):
        gradients = [p.grad for p in group if p.grad is not None]
        if norm > module.clip_norm and gradients:
            torch._foreach_mul_(local_parts(gradients), module.clip_norm / norm)


def _check_parameters(module: TrainModule, taken: StepLosses, *, skipped: bool) -> bool | None:
    """Finds out, after many skipped steps in a row, whether data or parameters are ill; None if that is not due."""
    if not skipped:
        module.skip_streak, module.last_good = 0, taken.last_batch
        return None
    module.skip_streak += 1
    if module.skip_streak % module.skips_max:
        return None
    return parameters_sound(module, _losses_of(module))


def _losses_of(module: TrainModule) -> Callable[[Batch], Mapping[str, Tensor]]:
    return lambda batch: checked_losses(module.job, module.model, batch, module.seeds.topology.training_seeds)
