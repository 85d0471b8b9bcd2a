"""Sharded tensors: the part of this rank, the whole over all ranks, and which of a whole tensor is this rank's.

A sharded tensor is a `torch.distributed.tensor.DTensor`, as `fully_shard` makes of parameters. All functions take other
tensors too, which they return unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether the tensor is distributed over ranks."""
    loaded = sys.modules.get("torch.distributed.tensor")  # which a lane without such tensors need not import: 0.5 s
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns the part of this rank, which shares the tensor's memory. May have no elements. Does not synchronise."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns `local` of each tensor."""
    return [local(tensor) for tensor in tensors]


def whole_value(tensor: Tensor) -> Tensor:
    """Returns the whole tensor, in new memory on the tensor's device. Every rank of its mesh has to call this."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    found: Tensor = sharded.full_tensor()
    return found


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Returns the view of a whole tensor that corresponds to the part of `like` on this rank."""
    if not is_sharded(like):
        return whole
    sharded: Any = like
    (chunk,) = sharded.__create_chunk_list__()  # torch has no other public way to the offsets of a part
    for dimension, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        whole = whole.narrow(dimension, min(start, whole.shape[dimension]), length)
    return whole


def sharded_like(part: Tensor, like: Tensor) -> Tensor:
    """Returns a tensor with the placement of `like` whose part on this rank is `part`, without communication."""
    if not is_sharded(like):
        return part
    made: Any = type(like).from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    found: Tensor = made
    return found


def placed_like(part: Tensor, like: Tensor) -> Tensor:
    """Returns a tensor of another shape with the placement of `like`, of which each rank has such a part."""
    made: Any = part if not is_sharded(like) else type(like).from_local(part, like.device_mesh, like.placements)
    found: Tensor = made
    return found


def on_all_parts(flags: Sequence[bool], tensors: Sequence[Tensor]) -> list[bool]:
    """Returns for each tensor whether its flag is true on all ranks, each of which has to call this if one is sharded.

    Synchronises then.
    """
    mesh: Any = next((tensor.device_mesh for tensor in tensors if is_sharded(tensor)), None)
    if mesh is None:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32, device=mesh.device_type)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=mesh.get_group())
    return [bool(flag) for flag in found.tolist()]
