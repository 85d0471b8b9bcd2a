"""Weighted means of tensors, and what makes a set of weights usable. Knows nothing of where weights come from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tolaria.errors import GradientMismatchError, GradientWeightError, NoGradientsError
from tolaria.gradients.flat import check_same_kind

if TYPE_CHECKING:
    from collections.abc import Sequence


def aggregate_weighted(tensors: Sequence[Tensor] | Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """The weighted mean: sum of w_i t_i divided by the sum of w_i.

    Args:
        tensors: n tensors of one shape (any rank, scalars included), dtype and device; or one tensor of shape (n, ...).
        weights: n finite numbers, none negative, not all zero. Each weighs a whole tensor, whatever its rank.

    Returns:
        A new tensor of the shape, dtype and device of one of them. Half precision is summed in float32.
        Does not synchronise with the device, unless `weights` lives there.

    Raises:
        NoGradientsError: there are no tensors.
        GradientMismatchError: one differs from the first in shape, dtype or device.
        GradientWeightError: the weights are unusable; `index` names the first offender.
    """
    rows = _checked_tensors(tensors)
    factors = checked_weights(weights, len(rows))
    total = sum(factors)
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    merged = torch.zeros_like(rows[0], dtype=wide)
    for row, factor in zip(rows, factors, strict=True):
        merged.add_(row, alpha=factor / total)
    return merged.to(rows[0].dtype)


def checked_weights(weights: Sequence[float] | Tensor, count: int) -> tuple[float, ...]:
    """The weights as Python floats, if there are `count` of them and they can be divided by their sum.

    Raises:
        GradientWeightError: wrong count, zero or overflowing sum (index None); or NaN, infinite, negative (its index).
    """
    values = tuple(float(weight) for weight in (weights.tolist() if isinstance(weights, Tensor) else weights))
    if len(values) != count:
        raise GradientWeightError(None, f"{len(values)} given for {count} gradients")
    for index, value in enumerate(values):
        check_weight(index, value)
    total = sum(values)
    if total == 0 or math.isinf(total):
        raise GradientWeightError(None, f"their sum is {total:g}; a mean cannot be taken")
    return values


def check_weight(index: int, value: float, *, whose: str = "") -> None:
    """Raise GradientWeightError unless the value is finite and not negative; `whose` is added to the message."""
    owner = f" (of {whose})" if whose else ""
    if not math.isfinite(value):
        raise GradientWeightError(index, f"{value}{owner} is not finite")
    if value < 0:
        raise GradientWeightError(index, f"{value}{owner} is negative")


def _checked_tensors(tensors: Sequence[Tensor] | Tensor) -> tuple[Tensor, ...]:
    rows = tuple(tensor.detach() for tensor in tensors)
    if not rows or rows[0].numel() == 0:
        raise NoGradientsError
    for index, row in enumerate(rows):
        check_same_kind(index, row, rows[0])
        if row.shape != rows[0].shape:
            raise GradientMismatchError(index, f"shape {tuple(row.shape)}, but gradient 0 has {tuple(rows[0].shape)}")
    return rows
