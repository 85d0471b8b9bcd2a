"""Gradients of several losses over shared parameters from one forward pass. Owns the backward passes of a microbatch.

Knows nothing of what the sources are, how rows are weighed or merged, or who applies them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

import torch

from tolaria.errors import GradientMismatchError, LossShapeError, NoGradientsError, UnknownSourceError
from tolaria.values.training import HOST

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

NOTHING_OWNED: Final[Mapping[str, Sequence[Tensor]]] = MappingProxyType({})

_Gradients: TypeAlias = "tuple[Sequence[Tensor | None], dict[str, tuple[Tensor | None, ...]]]"
"""Of one pass: over the shared parameters, and by source over its own."""


@dataclass(frozen=True, slots=True)
class SourceRows:
    """What one microbatch (or several, added up) says about each source.

    Attributes:
        names: the n sources with a row, in a stable order.
        matrix: shape (n, d), the gradients over the d elements of the shared parameters.
        present: for each source, whether it took part; its row is zero if not.
        own: for each source that owns parameters and took part, their gradients in the order given (None where
            its loss does not reach a parameter).
    """

    names: tuple[str, ...]
    matrix: Tensor
    present: tuple[bool, ...]
    own: Mapping[str, tuple[Tensor | None, ...]]


@dataclass(frozen=True, slots=True)
class _Pass:
    """One loss, the sources that have it, and whether any of them has a row."""

    loss: Tensor
    sources: tuple[str, ...]
    rows: tuple[int, ...]


def source_rows(
    losses: Mapping[str, Tensor],
    shared: Sequence[Tensor],
    *,
    names: Sequence[str] | None = None,
    own: Mapping[str, Sequence[Tensor]] = NOTHING_OWNED,
    out: Tensor | None = None,
    batched: bool = False,
) -> SourceRows:
    """Gradients of each source's loss over the shared parameters, and of each seed's loss over its own.

    The forward pass is never repeated: one backward pass for each distinct loss over the same graph, which the last one
    frees. Sources with the same loss tensor share a pass. Parameters' `.grad` stays as it is.

    Args:
        losses: a scalar that gradients flow from, by source. Sources without a row (isolated seeds) may be among them:
            only their own parameters get a gradient, by a pass that stops there.
        shared: the shared parameters, of one dtype and device, d elements in all.
        names: the n sources with a row, in order; those without a loss here get a row of zeros. None: all of `losses`.
        own: parameters that belong to one source only. They take that source's own gradient, unweighted.
        out: where to write the matrix, shape (n, d); None: new memory.
        batched: run all passes as one batched vector-Jacobian product, n times the memory. It saved up to 20 % where
            a pass costs less than launching it, and lost up to 80 % elsewhere, so the default is pass by pass. Where
            an operation cannot be batched, the passes are run one by one.

    Returns:
        Rows and own gradients, detached. Does not synchronise with the device.

    Raises:
        NoGradientsError: no losses, or nothing shared.
        LossShapeError: a loss that is not a scalar or that nothing can flow from; names its source.
        UnknownSourceError: `own` names a source without a loss.
    """
    order = tuple(losses) if names is None else tuple(names)
    width = sum(parameter.numel() for parameter in shared)
    _check(losses, own, width)
    matrix = _room(out, len(order), shared[0], width)
    passes = _passes(losses, order)
    gradients = _all_at_once(passes, shared, own) if batched else None
    if gradients is None:
        gradients = _one_by_one(passes, shared, own)
    owned: dict[str, tuple[Tensor | None, ...]] = {}
    for turn, (on_shared, on_own) in zip(passes, gradients, strict=True):
        _write(matrix, turn.rows, on_shared, shared)
        owned.update(on_own)
    for row, name in enumerate(order):
        if name not in losses:
            matrix[row].zero_()
    return SourceRows(order, matrix, tuple(name in losses for name in order), owned)


def losses_by_source(per_sample: Tensor, seed_ids: Sequence[str], sources: Sequence[str]) -> dict[str, Tensor]:
    """Split a batch's losses by the seed that each sample is meant for (the third part of the dataloader's triplet).

    Args:
        per_sample: shape (batch,), differentiable.
        seed_ids: a seed for each sample. Empty, or a seed that is no source now: the sample is the host's.
        sources: sources to split by.

    Returns:
        For each source with a sample here, the sum of its samples' losses divided by the size of the whole batch:
        rows then add up to the gradient of the batch's mean loss.

    Raises:
        GradientMismatchError: another number of ids than samples; the index is that of the first without its partner.
        LossShapeError: `per_sample` is not a vector.
    """
    if per_sample.dim() != 1:
        raise LossShapeError(f"losses per sample are a vector, not of shape {tuple(per_sample.shape)}")
    if len(seed_ids) != len(per_sample):
        raise GradientMismatchError(
            min(len(seed_ids), len(per_sample)), f"{len(seed_ids)} seed ids for {len(per_sample)} samples"
        )
    owners = sample_owners(seed_ids, sources)
    present = tuple(dict.fromkeys(owners))
    places = {name: place for place, name in enumerate(present)}
    index = torch.tensor([places[name] for name in owners], device=per_sample.device)
    sums = per_sample.new_zeros(len(present)).index_add(0, index, per_sample) / max(1, len(owners))
    return dict(zip(present, sums.unbind(), strict=True))


def sample_counts(seed_ids: Sequence[str], sources: Sequence[str]) -> Counter[str]:
    """How many samples of a batch are meant for each source, the host's included."""
    return Counter(sample_owners(seed_ids, sources))


def sample_owners(seed_ids: Sequence[str], sources: Sequence[str]) -> list[str]:
    """The source of each sample; the host where its seed is no source now."""
    known = frozenset(sources)
    return [seed_id if seed_id in known else HOST for seed_id in seed_ids]


def _check(losses: Mapping[str, Tensor], own: Mapping[str, Sequence[Tensor]], width: int) -> None:
    if not losses or width == 0:
        raise NoGradientsError
    for name, loss in losses.items():
        if loss.numel() != 1 or not loss.requires_grad:
            reason = f"has shape {tuple(loss.shape)}" if loss.numel() != 1 else "depends on no parameter"
            raise LossShapeError(f"the loss of source {name!r} {reason}; it must be a differentiable scalar")
    for name in own:
        if name not in losses:
            raise UnknownSourceError(f"source {name!r} owns parameters but has no loss in this microbatch")


def _room(out: Tensor | None, count: int, like: Tensor, width: int) -> Tensor:
    if out is None:
        return torch.empty(count, width, dtype=like.dtype, device=like.device)
    if out.shape != (count, width):
        raise GradientMismatchError(0, f"rows are to be written into {tuple(out.shape)}, not {(count, width)}")
    return out


def _passes(losses: Mapping[str, Tensor], order: tuple[str, ...]) -> list[_Pass]:
    by_loss: dict[int, list[str]] = {}
    for name, loss in losses.items():
        by_loss.setdefault(id(loss), []).append(name)
    rows = {name: row for row, name in enumerate(order)}
    return [
        _Pass(losses[names[0]], tuple(names), tuple(rows[name] for name in names if name in rows))
        for names in by_loss.values()
    ]


def _one_by_one(
    passes: Sequence[_Pass], shared: Sequence[Tensor], own: Mapping[str, Sequence[Tensor]]
) -> list[_Gradients]:
    results: list[_Gradients] = []
    for number, turn in enumerate(passes, start=1):
        wanted = list(shared) if turn.rows else []
        wanted += [parameter for name in turn.sources for parameter in own.get(name, ())]
        found = _grad(turn.loss, wanted, retain=number < len(passes)) if wanted else ()
        cut = len(shared) if turn.rows else 0
        results.append((found[:cut], _deal(found[cut:], turn, own)))
    return results


def _all_at_once(
    passes: Sequence[_Pass], shared: Sequence[Tensor], own: Mapping[str, Sequence[Tensor]]
) -> list[_Gradients] | None:
    """The same in one batched product; None when an operation on the way has no batching rule."""
    stacked = torch.stack([turn.loss.reshape(()) for turn in passes])
    owners = _owners(passes, own)
    wanted = [*shared, *(parameter for _, name in owners for parameter in own[name])]
    unit_vectors = torch.eye(len(passes), dtype=stacked.dtype, device=stacked.device)
    try:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            stacked, wanted, unit_vectors, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
    except RuntimeError:  # what torch raises for it; any other cause comes again, and out, when run one by one
        return None
    by_pass = [[None if grad is None else grad[place] for grad in found] for place in range(len(passes))]
    return _deal_batched(by_pass, owners, len(shared), own)


def _owners(passes: Sequence[_Pass], own: Mapping[str, Sequence[Tensor]]) -> list[tuple[int, str]]:
    return [(place, name) for place, turn in enumerate(passes) for name in turn.sources if name in own]


def _deal_batched(
    by_pass: Sequence[Sequence[Tensor | None]],
    owners: Sequence[tuple[int, str]],
    cut: int,
    own: Mapping[str, Sequence[Tensor]],
) -> list[_Gradients]:
    results: list[_Gradients] = [(found[:cut], {}) for found in by_pass]
    start = cut
    for place, name in owners:
        end = start + len(own[name])
        results[place][1][name] = tuple(by_pass[place][start:end])
        start = end
    return results


def _grad(loss: Tensor, wanted: Sequence[Tensor], *, retain: bool) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        loss, wanted, torch.ones_like(loss), retain_graph=retain, allow_unused=True
    )
    return found


def _deal(
    found: Sequence[Tensor | None], turn: _Pass, own: Mapping[str, Sequence[Tensor]]
) -> dict[str, tuple[Tensor | None, ...]]:
    dealt: dict[str, tuple[Tensor | None, ...]] = {}
    start = 0
    for name in turn.sources:
        if name in own:
            dealt[name] = tuple(found[start : start + len(own[name])])
            start += len(own[name])
    return dealt


def _write(matrix: Tensor, rows: Sequence[int], found: Sequence[Tensor | None], shared: Sequence[Tensor]) -> None:
    if not rows:
        return
    pieces = [
        (torch.zeros_like(parameter) if grad is None else grad).reshape(-1)
        for grad, parameter in zip(found, shared, strict=True)
    ]
    with torch.no_grad():
        torch.cat(pieces, out=matrix[rows[0]])
        for row in rows[1:]:
            matrix[row].copy_(matrix[rows[0]])
