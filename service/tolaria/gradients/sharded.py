"""Rows of sharded parameters: of each gradient this rank has a part, which `fully_shard` has summed over all ranks.

Such parameters are leaves of no graph: their gradients appear in `.grad` at the end of a backward pass. In that pass
the ranks communicate, so all of them run the same ones in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tolaria.gradients.flat import laid_out
from tolaria.gradients.rows import SourceRows, write_rows
from tolaria.shards import local, local_parts, sharded_like


def sharded_rows(
    losses: Mapping[str, Tensor],
    shared: Sequence[Tensor],
    *,
    sources: Sequence[str],
    names: Sequence[str],
    own: Mapping[str, Sequence[Tensor]],
    out: Tensor,
) -> SourceRows:
    """Computes this rank's part of each source's gradient over the shared parameters, and over the source's own.

    As `source_rows`, but with one backward pass for each of `sources`, also for those without a loss on this rank.
    `.grad` of all parameters is None afterwards.

    Args:
        losses: differentiable scalars by source, of this rank's samples; at least one.
        shared: the shared parameters, d elements in all on this rank.
        sources: the sources of all ranks, in the same order on all of them.
        names: the n sources with a row, in order.
        own: parameters that belong to one source only.
        out: memory for the matrix, shape (n, d).
    """
    nothing = torch.stack(list(losses.values())).sum() * 0.0
    owned: dict[str, tuple[Tensor | None, ...]] = {}
    everything = [*shared, *(parameter for parameters in own.values() for parameter in parameters)]
    for row, name in enumerate(names):
        if name not in sources:
            out[row].zero_()
    for number, source in enumerate(sources, start=1):
        for parameter in everything:
            parameter.grad = None
        torch.autograd.backward(losses.get(source, nothing), retain_graph=number < len(sources))
        if source in names:
            write_rows(out, [names.index(source)], _parts_of_gradients(shared), local_parts(shared))
        if source in own:
            owned[source] = tuple(_parts_of_gradients(own[source]))
    for parameter in everything:
        parameter.grad = None
    return SourceRows(tuple(names), out, tuple(name in losses for name in names), owned)


def write_gradients(parameters: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    """Makes parts on this rank the gradients of parameters, sharded or not; None drops the gradient."""
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = None if part is None else sharded_like(laid_out(part, local(parameter)), parameter)


def _parts_of_gradients(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if parameter.grad is None else local(parameter.grad) for parameter in parameters]
