"""Shards a model over the ranks of a group, by PyTorch's `fully_shard` (FSDP2): of each parameter a rank has a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable
from zlib import crc32

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from tolaria.errors import BrokenJobError, first_line
from tolaria.lane.job_output import call
from tolaria.ranks.group import Group
from tolaria.shards import is_sharded


@runtime_checkable
class ShardedJob(Protocol):
    """A job that says itself how its model is sharded."""

    def shard(self, model: nn.Module, mesh: DeviceMesh) -> Any:
        """Calls `fully_shard` on parts of the model and on the model, each with `mesh`, in place."""


class Sharding:
    """How one model, and the seeds grafted into it later, are sharded over a mesh of one dimension.

    Gradients are summed over the ranks, since each has the losses of its samples as parts of those of the batch.
    Parameters are whole only while a pass needs them, so that between two passes they are the sharded ones.

    Raises BrokenJobError if the model cannot be sharded.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._mesh = init_device_mesh(device.type, (group.world,))

    def shard_model(self, job: object, model: nn.Module) -> None:
        """Shards a model in place: as the job says, else each element of its `ModuleList`s, then the rest.

        Every rank has the leader's values then, whatever `build_model` draws.
        """
        tensors = dict((*model.named_parameters(), *model.named_buffers()))
        described = str([(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()])
        if len(set(self._group.all_gather_text(str(crc32(described.encode()))))) > 1:
            raise BrokenJobError("build_model() makes other parameters or buffers on other ranks")
        self._group.broadcast_tensors(list(tensors.values()))
        if isinstance(job, ShardedJob):
            call("shard", lambda: job.shard(model, self._mesh))
        else:
            _refusing("its model cannot be sharded", lambda: self._shard_blocks(model))
        if name := next((name for name, p in model.named_parameters() if not is_sharded(p)), ""):
            raise BrokenJobError(f"shard() leaves parameter {name!r} whole: call fully_shard on the model at last")
        _prepare(model)

    def shard_seed(self, branch: nn.Module) -> None:
        """Shards the branch of a seed in place, before it becomes part of the model. Raises BrokenJobError."""
        self._group.broadcast_tensors([*branch.parameters(), *branch.buffers()])
        if next(branch.parameters(), None) is not None:
            _refusing("the seed cannot be sharded", lambda: self._shard(branch))
            _prepare(branch)

    def _shard_blocks(self, model: nn.Module) -> None:
        for block in _blocks(model):
            self._shard(block)
        self._shard(model)

    def _shard(self, module: nn.Module) -> None:
        fully_shard(module, mesh=self._mesh, reshard_after_forward=True)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the elements of module lists that are called as a whole, the innermost first."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for blocks in reversed(lists):
        for block in blocks:
            if not isinstance(block, (nn.ModuleList, nn.ModuleDict)) and next(block.parameters(), None) is not None:
                yield block


def _prepare(module: nn.Module) -> None:
    """Has gradients summed, and parameters sharded after each pass, also where a job's `shard` does not say so."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.set_reshard_after_forward(reshard_after_forward=True, recurse=False)
            each.set_gradient_divide_factor(1.0)
            each.set_force_sum_reduction_for_comms(enable=True)


def _refusing(what: str, shard: Callable[[], object]) -> None:
    try:
        shard()
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise BrokenJobError(f"{what}: {type(error).__name__}: {first_line(error)}") from error
