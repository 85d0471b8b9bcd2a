"""Which steps are skipped because of their losses, and whether data or parameters are to blame for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tolaria.jobs import Batch
from tolaria.lane.device import on_device
from tolaria.lane.train_module import TrainModule
from tolaria.shards import local_parts
from tolaria.state.encoding import capture_rngs, restore_rngs


def parameters_sound(module: TrainModule, losses_of: Callable[[Batch], Mapping[str, Tensor]]) -> bool:
    """Runs the last good batch forward and backward without an update; changes nothing. Synchronises.

    Its loss and gradient are not finite if the parameters are ill. A loss that is NaN although parameters, buffers and
    the outputs of all modules are finite is the job's: going back would not help. Before the first good step there is
    no batch, and the parameters only have to be finite. `losses_of` returns the job's losses.
    """
    if not module.on_all_ranks(_finite(local_parts([*module.parameters, *module.model.buffers()]))):
        return False
    if module.last_good is None:
        return True
    rngs = capture_rngs()
    module.save_pass()
    try:
        with _watching(module) as outputs_finite:
            losses = _last_good_losses(module, module.last_good, losses_of)
        if module.on_all_ranks(essential_finite(module, losses)):
            if essential := [loss for source, loss in losses.items() if source not in module.isolated_seeds]:
                torch.autograd.backward(essential)
            return module.gradients_finite()
        return module.on_all_ranks(outputs_finite[0] and not any(math.isinf(loss.item()) for loss in losses.values()))
    finally:
        module.discard_pass()
        restore_rngs(*rngs)


def is_extreme(module: TrainModule, judged: float, losses_of: Callable[[Batch], Mapping[str, Tensor]]) -> bool:
    """Whether a step with this finite loss is skipped because it is extreme among the recent ones.

    After one that was, others are too while the last good batch has a healthy loss: then the data are ill, not the
    parameters, which have not changed in between. At most `health.skips_max` - 1 steps in a row are skipped; then
    training on such data shows whether they are a changed task. Synchronises.
    """
    window, batch = module.losses, module.last_good
    if not module.skips_extreme:
        return False
    if window.extreme(judged):
        return True
    if module.skip_streak + 1 >= module.skips_max or not window.extreme_again(judged):
        return False
    if batch is None:  # none since a restore, whose parameters were sound
        return True
    with module.forward_undone():
        losses = _last_good_losses(module, batch, losses_of)
    share, seeds = module.training_share, set(module.seeds.topology.training_seeds)
    loss, samples = judged_sum(losses, share.of(batch), share.counted(batch), seeds)
    sums = [0.0 if loss is None else loss.item(), float(samples)]
    if module.group is not None:
        sums = module.group.all_reduce(sums)
    return sums[0] <= sums[1] * window.limit


def judged_sum(
    losses: Mapping[str, Tensor], batch: Batch, counted: int, seeds: Collection[str]
) -> tuple[Tensor | None, int]:
    """Returns the sum over samples of the mean loss of the sources that are not seeds, and the number of these samples.

    `losses` are those of `counted` samples of the batch. (None, 0) if all samples belong to seeds.
    """
    tasks = [loss.detach() for source, loss in losses.items() if source not in seeds]
    samples = counted
    if samples and batch.seed_ids is not None:  # their losses are shares of the mean over the whole batch
        samples = sum(source not in seeds for source in batch.seed_ids)
    return (torch.stack(tasks).mean() * counted, samples) if samples and tasks else (None, 0)


def _last_good_losses(
    module: TrainModule, last_good: Batch, losses_of: Callable[[Batch], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    batch = on_device(module.training_share.of(last_good), module.device)
    with module.fast_paths.autocast(), module.seeds.groups_as_built():
        return losses_of(batch)


def essential_finite(module: TrainModule, losses: Mapping[str, Tensor]) -> bool:
    """Whether the losses that can affect the host are finite. Synchronises."""
    return all(
        math.isfinite(loss.detach().item()) for source, loss in losses.items() if source not in module.isolated_seeds
    )


@contextmanager
def _watching(module: TrainModule) -> Iterator[list[bool]]:
    """Within the block, [0] says whether all outputs of modules are finite; False for a compiled model, without hooks.

    Hooks would compile it anew.
    """
    finite = ["compile" not in module.fast_paths.running]

    def look(_module: nn.Module, _inputs: object, output: object) -> None:
        finite[0] = finite[0] and (not isinstance(output, Tensor) or _finite([output]))

    hooked = list(module.model.modules()) if finite[0] else []
    handles = [each.register_forward_hook(look) for each in hooked]
    try:
        yield finite
    finally:
        for handle in handles:
            handle.remove()


def _finite(tensors: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())
