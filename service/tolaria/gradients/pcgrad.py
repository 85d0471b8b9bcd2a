"""PCGrad (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", algorithm 1), computed in Gram space.

Owns the projection and what counts as a conflict; knows nothing of seeds, and never touches the global random state.

Every projected row is a combination of the given rows, and every dot product it needs is a combination of dot products
between them. So the rows are read twice only, once for their n x n Gram matrix and once for the final combination, and
all projecting happens on n x n numbers in float64.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from tolaria.gradients.gram import checked_rows, combine_rows, gram_matrix
from tolaria.gradients.weighted import checked_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tolaria.gradients.gram import Rows

EPSILON: Final = 1e-7
"""A cosine above -EPSILON is rounding, not a conflict: orthogonal rows stay so whatever they are multiplied by."""


@dataclass(frozen=True, slots=True)
class MergedGradient:
    """What became of n rows.

    Attributes:
        vector: shape (d,), the rows' dtype and device.
        conflicts: unordered pairs of rows with a negative dot product; 0 when nobody looked (PCGrad off, or one row).
        participants: rows that could conflict: those of finite norm above zero; all when nobody looked.
        projected: whether PCGrad looked at more than one row.
    """

    vector: Tensor
    conflicts: int
    participants: int
    projected: bool

    @property
    def grad_conflict_rate(self) -> float:
        """Conflicts per participant but one: the formula that dashboards know. Can exceed 1."""
        return self.conflicts / max(1, self.participants - 1)

    @property
    def pair_conflict_rate(self) -> float:
        """The part of all pairs of participants that conflicts, 0 to 1."""
        return self.conflicts / max(1, self.participants * (self.participants - 1) // 2)


@dataclass(frozen=True, slots=True)
class Projection:
    """The answer of `project`, in plain numbers.

    Attributes:
        coefficients: n lists of n; projected row i is the sum over j of coefficients[i][j] times row j.
        conflicts_by_row: for each row, the number of others that it conflicts with.
        participants: how many rows took part.
    """

    coefficients: list[list[float]]
    conflicts_by_row: list[int]
    participants: int

    @property
    def conflicts(self) -> int:
        """Unordered pairs that conflict."""
        return sum(self.conflicts_by_row) // 2

    def merged(self, weights: Sequence[float] | None) -> list[float]:
        """The n coefficients of the sum of all projected rows, or of their weighted mean."""
        factors = plain_coefficients(len(self.coefficients), weights)
        return [
            math.fsum(f * row[j] for f, row in zip(factors, self.coefficients, strict=True))
            for j in range(len(factors))
        ]


@torch.no_grad()
def combine_flat_grads(
    flats: Rows,
    *,
    use_pcgrad: bool = True,
    weights: Sequence[float] | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MergedGradient:
    """Merge rows into one gradient.

    Args:
        flats: n vectors of one length, dtype and device, or a matrix (n, d). Never modified, never aliased.
        use_pcgrad: remove from each row the part that goes against another before merging.
        weights: n of them: the weighted mean of the (projected) rows. None: their sum.
        generator: a CPU generator that the order of projections is drawn from, such as `step_generator` gives. None: a
            fixed order. The same rows and generator state give the same bits.

    Returns:
        The merged vector, as new memory, and the count of conflicts. With PCGrad and more than one row it waits
        for the device once; otherwise not at all. One row comes back with its own values. A row that is not finite
        is left out of the projections but stays in the sum, so that the result tells of it.

    Raises:
        NoGradientsError, GradientMismatchError, GradientWeightError: see `checked_rows` and `checked_weights`.
    """
    rows = checked_rows(flats)
    count = len(rows)
    factors = None if weights is None else checked_weights(weights, count)
    if count == 1:
        return MergedGradient(rows[0].clone(), 0, 1, projected=False)
    if not use_pcgrad:
        return MergedGradient(combine_rows(rows, plain_coefficients(count, factors)), 0, count, projected=False)
    projection = project(gram_matrix(rows), projection_order(count, generator))
    vector = combine_rows(rows, projection.merged(factors))
    return MergedGradient(vector, projection.conflicts, projection.participants, projected=True)


def project(gram: Tensor, order: Sequence[Sequence[int]]) -> Projection:
    """Run PCGrad on dot products alone, in plain numbers: a tensor operation costs more than they do.

    Args:
        gram: shape (n, n), float64, CPU, symmetric.
        order: n sequences; the i-th lists the other rows in the order in which row i meets them.
    """
    dots = gram.tolist()
    norms = [math.sqrt(dots[i][i]) if 0 < dots[i][i] < math.inf else 0.0 for i in range(len(dots))]
    coefficients = [_project_row(i, order[i], dots, norms) for i in range(len(dots))]
    return Projection(
        coefficients,
        [sum(_conflicts(row[j], norms[i], norms[j]) for j in range(len(dots))) for i, row in enumerate(dots)],
        sum(norm > 0 for norm in norms),
    )


def projection_order(count: int, generator: torch.Generator | None) -> list[list[int]]:
    """For each of n rows a permutation of the others, drawn from a CPU generator (None: one with a fixed seed)."""
    keys = torch.rand(count, count, dtype=torch.float64, generator=generator or torch.Generator().manual_seed(0))
    keys.fill_diagonal_(2.0)  # beyond every draw: a row meets itself last, and that column is cut off
    order: list[list[int]] = keys.argsort(dim=1)[:, : count - 1].tolist()
    return order


def step_generator(run_seed: int | str, step: int) -> torch.Generator:
    """The private CPU generator of one step of one run: the same pair always gives the same draws."""
    digest = hashlib.blake2b(f"{run_seed}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def plain_coefficients(count: int, weights: Sequence[float] | None) -> list[float]:
    """The n coefficients of a merge without projection: all 1, or the weights divided by their sum."""
    if weights is None:
        return [1.0] * count
    total = sum(weights)
    return [weight / total for weight in weights]


def _project_row(row: int, order: Sequence[int], gram: list[list[float]], norms: list[float]) -> list[float]:
    """Coefficients of one row after it has met the others, each as it was given."""
    coefficients = [0.0] * len(gram)
    coefficients[row] = 1.0
    dots = gram[row]  # of this row, as projected so far, with every given row
    for other in order:
        if _conflicts(dots[other], norms[row], norms[other]):
            removed = dots[other] / gram[other][other]
            coefficients[other] -= removed
            dots = [dot - removed * step for dot, step in zip(dots, gram[other], strict=True)]
    return coefficients


def _conflicts(dot: float, norm: float, other_norm: float) -> bool:
    """Rows without a finite norm have norm 0 here, and conflict with nothing."""
    return norm > 0 and other_norm > 0 and dot < -EPSILON * norm * other_norm
