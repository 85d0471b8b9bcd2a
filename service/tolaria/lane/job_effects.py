"""What a job must leave to Tolaria, or to `build_model`: steps, gradients, new parameters. The first look checks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tolaria.errors import BrokenJobError
from tolaria.jobs import Batch, PerSampleLosses
from tolaria.lane.train_module import TrainModule
from tolaria.shards import local, local_parts
from tolaria.values.evaluation import Evaluation
from tolaria.values.training import eager_name

_MARKED: Final = 64
"""The smallest parameters that get a gradient before the losses; more could need memory that a step does not."""

_ROUNDINGS: Final = 8
"""Roundings by which a parameter may differ after a second projection, as of a norm, that changes nothing else."""


class LossesObserved:
    """The job of a module for one step, whose `losses` is refused if it changes gradients or drops earlier ones.

    Only `losses` is needed. `accumulate` is the number of microbatches in the steps of the run.
    """

    def __init__(self, module: TrainModule, accumulate: int) -> None:
        self._module, self._job, self._accumulate = module, module.job, accumulate

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor] | PerSampleLosses:
        """Returns the job's losses, called beside gradients of one. Raises BrokenJobError. Synchronises."""
        parameters = sorted(self._module.parameters, key=Tensor.numel)
        for parameter in parameters[:_MARKED]:
            parameter.grad = torch.ones_like(parameter)
        marks = [parameter.grad for parameter in parameters]
        losses = self._job.losses(model, batch)
        found = [parameter.grad for parameter in parameters]
        self._module.clear_gradients()
        # A tensor's version counts writes to it.
        changed = [g for g, mark in zip(found, marks, strict=True) if g is not mark or (g is not None and g._version)]  # noqa: SLF001
        if any(gradient is not None and bool(gradient.any()) for gradient in changed):
            raise BrokenJobError(
                "losses() changes the gradients of parameters, as backward() and clip_grad_norm_() do, before Tolaria "
                "backpropagates what it returns: return the loss, clip by training.clip_norm, and use "
                "torch.autograd.grad for other gradients"
            )
        if changed and self._accumulate > 1:
            raise BrokenJobError(
                "losses() clears gradients, as zero_grad() does, which drops those of earlier microbatches "
                "(training.accumulate): Tolaria clears them before each update"
            )
        return losses


@contextmanager
def own_steps_refused(module: TrainModule, method: Callable[[], str]) -> Iterator[set[str]]:
    """Within the block a step of the optimizer raises BrokenJobError, unless `method()` is empty.

    Yields sentences about other optimizers.
    """
    notes = set[str]()

    def refuse(stepped: torch.optim.Optimizer, *_: object) -> None:
        if not (name := method()):
            return
        if stepped is module.optimizer:
            raise BrokenJobError(
                f"{name} calls step() of the optimizer, which Tolaria calls after each update's losses: return the loss"
            )
        notes.add(
            f"{name} steps another optimizer, {type(stepped).__name__}: no rollback restores its state, unless "
            "state_dict() of the job has it, and skipped steps keep its updates; one optimizer can have a param group, "
            "and losses() a loss, for each part of a model"
        )

    hook = register_optimizer_step_pre_hook(refuse)
    try:
        yield notes
    finally:
        hook.remove()


def tensors_of(model: nn.Module) -> dict[str, nn.Parameter | None]:
    """Returns the parameters by name, and None for each buffer, also for one that is None yet."""
    buffers = [f"{path}.{name}" if path else name for path, m in model.named_modules() for name in m._buffers]  # noqa: SLF001 - with those that are None
    named = dict[str, nn.Parameter | None](model.named_parameters()) | dict.fromkeys(buffers)
    return {eager_name(name): tensor for name, tensor in named.items()}


def check_tensors(model: nn.Module, built: Mapping[str, nn.Parameter | None], method: str) -> None:
    """Compares parameters and buffers with those that were `built`. Raises BrokenJobError, which names one."""
    for name, tensor in tensors_of(model).items():
        if name in built and tensor is built[name]:
            continue
        kind = "buffer" if tensor is None else "parameter"
        owner = name.rpartition(".")[0]
        raise BrokenJobError(
            f"{method}(): a pass {'replaces' if name in built else 'creates'} {kind} {name!r}, which the optimizer and "
            f"saved states do not have: create {repr(owner) if owner else 'it'} in __init__, or as a module with lazy "
            "shapes such as nn.LazyLinear, which Tolaria completes before build_optimizer"
        )


def checked_twice(module: TrainModule, evaluate: Callable[[], Evaluation]) -> Evaluation:
    """Returns an evaluation, and checks that evaluations do not train the model. Synchronises.

    A projection, such as a bound on a norm, may change what the update left; a second pass then changes no more.

    Raises:
        BrokenJobError: names a parameter that changes with every pass.
    """
    module.clear_gradients()  # their memory holds the copies
    kept = [local(parameter).detach().clone() for parameter in module.parameters]
    evaluation = evaluate()
    if module.on_all_ranks(all(map(torch.equal, local_parts(module.parameters), kept))):
        return evaluation
    projected = {parameter: local(parameter).detach().clone() for parameter in module.parameters}
    evaluate()
    for name, parameter in module.model.named_parameters():
        part = local(parameter)
        before = projected.get(parameter, part)
        tolerance = _ROUNDINGS * torch.finfo(parameter.dtype).eps if parameter.is_floating_point() else 0.0
        if not torch.allclose(part, before, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise BrokenJobError(
                f"evaluate(): parameter {eager_name(name)!r} changes with every pass, so that evaluations and repeated "
                "steps would train the model: change parameters only by the optimizer, or where a second pass changes "
                "nothing"
            )
    return evaluation
