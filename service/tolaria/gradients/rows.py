"""Gradient rows: the gradients of several losses over shared parameters, from one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import Final, TypeAlias

import torch
from torch import Tensor

from tolaria.errors import (
    GradientMismatchError,
    LossShapeError,
    NoGradientsError,
    UnknownSourceError,
    UnmergeableParameterError,
)
from tolaria.values.training import HOST

OwnGradients: TypeAlias = Mapping[str, tuple[Tensor | None, ...]]
"""By source, the gradients of the parameters that only it owns; None where its loss does not reach a parameter."""

_NOTHING_OWNED: Final[Mapping[str, Sequence[Tensor]]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SourceRows:
    """The gradients of one microbatch by source.

    Attributes:
        names: the n sources with a row, in a stable order.
        matrix: shape (n, d), the gradients over the d elements of the shared parameters.
        present: for each source, whether it has a loss; its row is zero if not.
        own: the gradients of the present sources over their own parameters.
    """

    names: tuple[str, ...]
    matrix: Tensor
    present: tuple[bool, ...]
    own: OwnGradients


def source_rows(
    losses: Mapping[str, Tensor],
    shared: Sequence[Tensor],
    *,
    names: Sequence[str] | None = None,
    own: Mapping[str, Sequence[Tensor]] = _NOTHING_OWNED,
    out: Tensor | None = None,
) -> SourceRows:
    """Computes the gradients of each source's loss over the shared parameters, and over the source's own.

    Runs one backward pass for each distinct loss over the same graph, which the last pass frees. Sources with the same
    loss tensor share a pass. The parameters' `.grad` does not change.

    Args:
        losses: differentiable scalars by source. A source without a row (an isolated seed) has gradients over its own
            parameters only.
        shared: the shared parameters, on one device, d elements in all.
        names: the n sources with a row, in order; those without a loss get a row of zeros. None: all of `losses`.
        own: parameters that belong to one source only. Their gradient is that of the source's loss, unweighted.
        out: memory for the matrix, shape (n, d); None: new memory, in the dtype to which those of `shared` promote.

    Returns:
        Rows and own gradients, detached. Does not synchronise.

    Raises:
        NoGradientsError: no losses, or nothing shared.
        LossShapeError: a loss is not a scalar or not differentiable; names its source.
        UnknownSourceError: `own` names a source without a loss.
    """
    order = tuple(losses) if names is None else tuple(names)
    _check(losses, own)
    matrix = _row_memory(out, len(order), shared)
    passes: dict[int, list[str]] = {}
    for name, loss in losses.items():
        passes.setdefault(id(loss), []).append(name)
    owned: dict[str, tuple[Tensor | None, ...]] = {}
    for number, sources in enumerate(passes.values(), start=1):
        rows = [row for row, name in enumerate(order) if name in sources]
        wanted = list(shared) if rows else []
        ends = [len(wanted)]
        for name in sources:
            wanted += own.get(name, ())
            ends.append(len(wanted))
        found = _gradients(losses[sources[0]], wanted, retain=number < len(passes))
        if rows:
            write_rows(matrix, rows, found[: len(shared)], shared)
        for name, start, end in zip(sources, ends, ends[1:], strict=False):
            if name in own:
                owned[name] = found[start:end]
    for row, name in enumerate(order):
        if name not in losses:
            matrix[row].zero_()
    return SourceRows(order, matrix, tuple(name in losses for name in order), owned)


def row_dtype(shared: Sequence[tuple[str, Tensor]]) -> torch.dtype:
    """Returns the dtype of rows over named parameters, to which all of theirs promote.

    Raises:
        UnmergeableParameterError: names the first that is not of a real floating-point dtype, or not on the device of
            the first one.
    """
    device = shared[0][1].device
    for name, parameter in shared:
        if not parameter.is_floating_point() or parameter.device != device:
            raise UnmergeableParameterError(
                f"gradients of several sources cannot be merged over parameter {name!r}, which is {parameter.dtype} on "
                f"{parameter.device}: all must be of real floating-point types on {device}; gradients.mode = sum does "
                "not require this"
            )
    return reduce(torch.promote_types, (parameter.dtype for _, parameter in shared))


def losses_by_source(per_sample: Tensor, seed_ids: Sequence[str], sources: Sequence[str]) -> dict[str, Tensor]:
    """Splits the losses of a batch, shape (batch,), by the seed of each sample.

    An empty id, or that of a seed that is not among `sources`, means the host. Each loss is the sum of the source's
    samples divided by the size of the whole batch, so that the rows add up to the gradient of the batch's mean loss.

    Raises:
        GradientMismatchError: another number of ids than samples; the index is that of the first without a match.
        LossShapeError: `per_sample` is not a vector.
    """
    if per_sample.dim() != 1:
        raise LossShapeError(f"losses per sample are a vector, not of shape {tuple(per_sample.shape)}")
    if len(seed_ids) != len(per_sample):
        raise GradientMismatchError(
            min(len(seed_ids), len(per_sample)), f"{len(seed_ids)} seed ids for {len(per_sample)} samples"
        )
    owners = _sample_owners(seed_ids, sources)
    present = tuple(dict.fromkeys(owners))
    positions = {name: position for position, name in enumerate(present)}
    index = torch.tensor([positions[name] for name in owners], device=per_sample.device)
    sums = per_sample.new_zeros(len(present)).index_add(0, index, per_sample) / max(1, len(owners))
    return dict(zip(present, sums.unbind(), strict=True))


def sample_counts(seed_ids: Sequence[str], sources: Sequence[str]) -> Counter[str]:
    """Returns the number of a batch's samples for each source, the host included."""
    return Counter(_sample_owners(seed_ids, sources))


def _sample_owners(seed_ids: Sequence[str], sources: Sequence[str]) -> list[str]:
    known = frozenset(sources)
    return [seed_id if seed_id in known else HOST for seed_id in seed_ids]


def _check(losses: Mapping[str, Tensor], own: Mapping[str, Sequence[Tensor]]) -> None:
    if not losses:
        raise NoGradientsError
    for name, loss in losses.items():
        if loss.numel() != 1 or not loss.requires_grad:
            reason = f"has shape {tuple(loss.shape)}" if loss.numel() != 1 else "depends on no parameter"
            raise LossShapeError(f"the loss of source {name!r} {reason}; it must be a differentiable scalar")
    for name in own:
        if name not in losses:
            raise UnknownSourceError(f"source {name!r} owns parameters but has no loss in this microbatch")


def _row_memory(out: Tensor | None, count: int, shared: Sequence[Tensor]) -> Tensor:
    width = sum(parameter.numel() for parameter in shared)
    if width == 0:
        raise NoGradientsError
    if out is None:
        dtype = reduce(torch.promote_types, (parameter.dtype for parameter in shared))
        return torch.empty(count, width, dtype=dtype, device=shared[0].device)
    if out.shape != (count, width):
        raise GradientMismatchError(0, f"rows are to be written into {tuple(out.shape)}, not {(count, width)}")
    return out


def _gradients(loss: Tensor, wanted: Sequence[Tensor], *, retain: bool) -> tuple[Tensor | None, ...]:
    if not wanted:
        return ()
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        loss, wanted, torch.ones_like(loss), retain_graph=retain, allow_unused=True
    )
    return found


def write_rows(matrix: Tensor, rows: Sequence[int], found: Sequence[Tensor | None], shared: Sequence[Tensor]) -> None:
    """Writes the gradients `found` of the shared parameters, zeros for None, into these rows of a matrix (n, d)."""
    pieces = [_dense(grad, parameter).reshape(-1) for grad, parameter in zip(found, shared, strict=True)]
    with torch.no_grad():
        torch.cat(pieces, out=matrix[rows[0]])
        for row in rows[1:]:
            matrix[row].copy_(matrix[rows[0]])


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient if gradient.layout == torch.strided else gradient.to_dense()
