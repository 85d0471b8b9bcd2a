"""PCGrad (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", algorithm 1), computed in Gram space.

Every projected row is a combination of the given rows, and every dot product in the algorithm is a combination of dot
products between them. So the rows are read only twice, for their n x n Gram matrix and for the final combination, and
all projections are computed on n x n numbers in float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tolaria.gradients.gram import Rows, checked_rows, combine_rows, gram_matrix
from tolaria.gradients.weights import checked_weights

_EPSILON: Final = 1e-7
"""A cosine above -EPSILON is a rounding error and no conflict, so that orthogonal rows never conflict."""


@dataclass(frozen=True, slots=True)
class MergedGradient:
    """The result of merging n rows.

    Attributes:
        vector: shape (d,), the rows' dtype and device.
        conflicts: unordered pairs of rows with a negative dot product; 0 without PCGrad or with one row.
        participants: rows that can conflict: those of finite norm above zero; all rows without PCGrad.
        projected: whether PCGrad ran on more than one row.
    """

    vector: Tensor
    conflicts: int
    participants: int
    projected: bool

    @property
    def grad_conflict_rate(self) -> float:
        """Conflicts divided by participants minus one. Can exceed 1."""
        return self.conflicts / max(1, self.participants - 1)

    @property
    def pair_conflict_rate(self) -> float:
        """The fraction of all pairs of participants that conflict, 0 to 1."""
        return self.conflicts / max(1, self.participants * (self.participants - 1) // 2)


@dataclass(frozen=True, slots=True)
class Projection:
    """The result of `project`, in plain numbers.

    Attributes:
        coefficients: n lists of n; projected row i is the sum over j of coefficients[i][j] times row j.
        conflicts_by_row: for each row, the number of others that it conflicts with.
        participants: number of rows that can conflict.
    """

    coefficients: list[list[float]]
    conflicts_by_row: list[int]
    participants: int

    def combined(self, factors: Sequence[float]) -> list[float]:
        """Returns the n coefficients of the sum over i of factors[i] times projected row i."""
        columns = zip(*self.coefficients, strict=True)
        return [math.fsum(f * c for f, c in zip(factors, column, strict=True)) for column in columns]

    def merged(self, vector: Tensor) -> MergedGradient:
        """Returns `vector` with the conflicts of this projection."""
        return MergedGradient(vector, sum(self.conflicts_by_row) // 2, self.participants, projected=True)


@torch.no_grad()
def combine_flat_grads(
    flats: Rows,
    *,
    use_pcgrad: bool = True,
    weights: Sequence[float] | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MergedGradient:
    """Merges rows into one gradient.

    Args:
        flats: n vectors of one length, dtype and device, or a matrix (n, d). Not modified.
        use_pcgrad: whether to remove from each row the part that conflicts with another.
        weights: n weights: the weighted mean of the (projected) rows. None: their sum.
        generator: a CPU generator for the order of projections, such as that of `step_generator`. None: a fixed order.
            The same rows and generator state give the same bits.

    Returns:
        The merged vector in new memory, and the number of conflicts. Synchronises once with PCGrad and more than one
        row, else not at all. A single row is returned unchanged. A row that is not finite is not projected but stays
        in the sum, so that the result is not finite either.

    Raises:
        NoGradientsError, GradientMismatchError, GradientWeightError: see `checked_rows` and `checked_weights`.
    """
    rows = checked_rows(flats)
    count = len(rows)
    factors = None if weights is None else checked_weights(weights, count)
    if count == 1:
        return MergedGradient(rows[0].clone(), 0, 1, projected=False)
    if not use_pcgrad:
        return MergedGradient(combine_rows(rows, _factors(count, factors)), 0, count, projected=False)
    projection = project(gram_matrix(rows), projection_order(count, generator))
    return projection.merged(combine_rows(rows, projection.combined(_factors(count, factors))))


def project(gram: Tensor, order: Sequence[Sequence[int]]) -> Projection:
    """Runs PCGrad on dot products, in plain numbers, since single tensor operations cost more.

    Args:
        gram: shape (n, n), float64, CPU, symmetric.
        order: n sequences; the i-th lists the other rows in the order in which row i is projected against them.
    """
    dots = gram.tolist()
    norms = _norms(dots)
    coefficients = [_project_row(i, order[i], dots, norms) for i in range(len(dots))]
    return Projection(coefficients, *count_conflicts(dots))


def count_conflicts(dots: list[list[float]]) -> tuple[list[int], int]:
    """Returns for each row the number of others that it conflicts with, and the number of rows that can conflict."""
    norms = _norms(dots)
    conflicts = [sum(_conflicts(row[j], norms[i], norms[j]) for j in range(len(dots))) for i, row in enumerate(dots)]
    return conflicts, sum(norm > 0 for norm in norms)


def projection_order(count: int, generator: torch.Generator | None) -> list[list[int]]:
    """Returns for each of n rows a permutation of the others, drawn from a CPU generator (None: a fixed seed)."""
    keys = torch.rand(count, count, dtype=torch.float64, generator=generator or torch.Generator().manual_seed(0))
    keys.fill_diagonal_(2.0)  # above every draw: the row itself sorts last, and that column is cut off
    order: list[list[int]] = keys.argsort(dim=1)[:, : count - 1].tolist()
    return order


def step_generator(run_seed: int | str, step: int) -> torch.Generator:
    """Returns a CPU generator for one step of one run: the same pair always gives the same draws."""
    digest = hashlib.blake2b(f"{run_seed}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _factors(count: int, weights: Sequence[float] | None) -> list[float]:
    """Returns n factors for a sum (all 1) or a weighted mean (the weights divided by their sum)."""
    if weights is None:
        return [1.0] * count
    total = sum(weights)
    return [weight / total for weight in weights]


def _project_row(row: int, order: Sequence[int], gram: list[list[float]], norms: list[float]) -> list[float]:
    """Returns the coefficients of one row, projected against the others as they were given."""
    coefficients = [0.0] * len(gram)
    coefficients[row] = 1.0
    dots = gram[row]  # of this row, as projected so far, with every given row
    for other in order:
        if _conflicts(dots[other], norms[row], norms[other]):
            removed = dots[other] / gram[other][other]
            coefficients[other] -= removed
            dots = [dot - removed * step for dot, step in zip(dots, gram[other], strict=True)]
    return coefficients


def _norms(dots: list[list[float]]) -> list[float]:
    return [math.sqrt(dots[i][i]) if 0 < dots[i][i] < math.inf else 0.0 for i in range(len(dots))]


def _conflicts(dot: float, norm: float, other_norm: float) -> bool:
    """Rows without a finite norm have norm 0 here and never conflict."""
    return norm > 0 and other_norm > 0 and dot < -_EPSILON * norm * other_norm
