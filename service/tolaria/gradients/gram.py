"""The two passes over a gradient matrix that dominate the cost of a merge: its Gram matrix, and combinations of rows.

Shapes: n rows, d elements each; a block is all n rows over some of the d columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor

from tolaria.errors import GradientMismatchError, NoGradientsError
from tolaria.gradients.flat import check_same_kind

Rows: TypeAlias = Tensor | Sequence[Tensor]
"""n vectors of d elements, or a matrix of shape (n, d)."""

_CHUNK: Final = 16_384
"""Columns whose products are summed in float32 before the sum continues in float64: 1e-7 at full speed."""

_SHORT: Final = 32_768
"""Rows up to this length are multiplied in float64 throughout, at no measurable cost."""

_BLOCK_BYTES: Final = {"cpu": 2**22, "cuda": 2**28}
"""Bytes of rows that are converted or gathered at once: fits a cache, or a small part of a device."""

_SLICE: Final = 524_288
"""Columns combined at once, so that the running sum stays in the cache."""

_FLOAT32_DIAGONAL_MIN: Final = 1.2e-29
"""Per element: below it, products that underflow in float32 could exceed 1e-9 of a squared norm."""

_FLOAT32_COEFFICIENT_MIN, _FLOAT32_COEFFICIENT_MAX = 1e-30, 1e30
"""Coefficients outside this range are applied in float64."""


def checked_rows(flats: Rows) -> Rows:
    """Returns the rows, detached, if they are real and of one length, dtype and device.

    Raises:
        NoGradientsError: there are no rows, or they have no elements.
        GradientMismatchError: a row is not a vector or differs from row 0.
    """
    if isinstance(flats, Tensor) and flats.dim() != 2:
        raise GradientMismatchError(0, f"rows are vectors or one matrix (n, d), not a tensor of rank {flats.dim()}")
    rows = flats.detach() if isinstance(flats, Tensor) else [flat.detach() for flat in flats]
    for index, row in enumerate(rows):
        if row.dim() != 1:
            raise GradientMismatchError(index, f"a row has one dimension, not {row.dim()}")
        check_same_kind(index, row, rows[0])
        if row.numel() != rows[0].numel():
            raise GradientMismatchError(index, f"{row.numel()} elements, but gradient 0 has {rows[0].numel()}")
    if len(rows) == 0 or rows[0].numel() == 0:
        raise NoGradientsError
    return rows


def gram_matrix(rows: Rows) -> Tensor:
    """Returns all dot products between rows.

    Products are summed in float32 over chunks of columns and the chunks in float64, with an error of about 1e-7 of the
    rows' norms; in float64 throughout for short rows, on a device (where TF32 may be on), or where the squares exceed
    the range of float32. So only float64 rows can overflow or underflow, outside 1e-150 to 1e150.

    Returns:
        Shape (n, n), float64, symmetric, on the CPU: one transfer, which synchronises.
    """
    row = rows[0]
    if row.device.type == "cpu" and row.dtype != torch.float64 and row.numel() > _SHORT and _products_are_exact():
        gram = _gram_in(rows, torch.float32)
        if _in_range(gram, rows):
            return gram
    return _gram_in(rows, torch.float64)


def combine_rows(rows: Rows, coefficients: Sequence[float], *, out: Tensor | None = None) -> Tensor:
    """Returns the sum of c_i times row i, computed in float32 or wider.

    Args:
        rows: n rows.
        coefficients: n numbers.
        out: memory for the result, like a row but not one of them. None: new memory, whose mapping takes two thirds
            of the whole time at ten million elements.

    Returns:
        The vector (d,) in the rows' dtype, on their device. Does not synchronise.
    """
    first = rows[0]
    in_range = all(c == 0 or _FLOAT32_COEFFICIENT_MIN <= abs(c) <= _FLOAT32_COEFFICIENT_MAX for c in coefficients)
    precision = torch.promote_types(first.dtype, torch.float32 if in_range else torch.float64)
    direct = out is not None and out.dtype == precision
    total = out if out is not None and direct else torch.empty(first.shape, dtype=precision, device=first.device)
    for start in range(0, first.numel(), _SLICE):
        columns = slice(start, start + _SLICE)
        target = total[columns]
        torch.mul(first[columns].to(precision), coefficients[0], out=target)
        for row, coefficient in zip(rows[1:], coefficients[1:], strict=True):
            target.add_(row[columns], alpha=coefficient)
    if out is None:
        return total.to(first.dtype)
    return out if direct else out.copy_(total)


def _products_are_exact() -> bool:
    """Whether torch computes float32 products in all 24 bits: not where TF32 or bfloat16 may be in use."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        # From 2.9 on precision can be set by backend; torch then has no single answer, and some backend is not exact.
        return False


def _gram_in(rows: Rows, precision: torch.dtype) -> Tensor:
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows[0].device)
    with torch.autocast(gram.device.type, enabled=False):
        for block in _blocks(rows, precision):
            gram += _block_gram(block)
    gram = gram.cpu()
    return (gram + gram.T) / 2


def _block_gram(block: Tensor) -> Tensor:
    count, width = block.shape
    whole = width // _CHUNK * _CHUNK
    chunks = block[:, :whole].view(count, -1, _CHUNK).transpose(0, 1) if whole else block.new_zeros(0, count, 1)
    gram = torch.bmm(chunks, chunks.transpose(1, 2)).sum(0, dtype=torch.float64)
    rest = block[:, whole:]
    return gram + (rest @ rest.T) if rest.shape[1] else gram


def _blocks(rows: Rows, precision: torch.dtype) -> Iterator[Tensor]:
    """Yields blocks of columns in the given precision: a view if possible, else copies in one buffer."""
    first = rows[0]
    if isinstance(rows, Tensor) and first.dtype == precision:
        yield rows
        return
    room = _BLOCK_BYTES.get(first.device.type, 2**22) // (len(rows) * precision.itemsize)
    width = min(max(_CHUNK, room // _CHUNK * _CHUNK), first.numel())
    buffer = torch.empty(len(rows), width, dtype=precision, device=first.device)
    for start in range(0, first.numel(), width):
        block = buffer[:, : min(width, first.numel() - start)]
        for target, row in zip(block, rows, strict=True):
            target.copy_(row[start : start + width])
        yield block


def _in_range(gram: Tensor, rows: Rows) -> bool:
    """Whether no squared norm overflowed, and no row but zeros is so small that products underflowed."""
    smallest = rows[0].numel() * _FLOAT32_DIAGONAL_MIN
    return all(
        smallest <= square < float("inf") or (square == 0 and not bool(row.any()))
        for square, row in zip(gram.diagonal().tolist(), rows, strict=True)
    )
