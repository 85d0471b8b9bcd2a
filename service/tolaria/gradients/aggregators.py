"""Aggregators of gradients by name: PCGrad, and weightings of torchjd, both computed on dot products.

A weighting of torchjd (https://torchjd.org) returns a coefficient for each row from their Gram matrix. Here the rows
are taken times their weights, and the coefficients times the number of rows, so that all aggregators have the scale of
PCGrad: equal rows give the weighted sum.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from tolaria.gradients.pcgrad import Projection, count_conflicts, project

PCGRAD: Final = "pcgrad"

_CAGRAD_C: Final = 0.4
"""Radius of CAGrad's ball around the mean gradient. 0.4: that of its authors for two of their three benchmarks."""

_WEIGHTINGS: Final[Mapping[str, tuple[str, Mapping[str, float]]]] = {
    "upgrad": ("UPGradWeighting", {}),
    "dualproj": ("DualProjWeighting", {}),
    "mgda": ("MGDAWeighting", {}),
    "cagrad": ("CAGradWeighting", {"c": _CAGRAD_C}),
    "imtl_g": ("IMTLGWeighting", {}),
    "aligned_mtl": ("AlignedMTLWeighting", {}),
}
"""Those of torchjd that are functions of the Gram matrix alone, without random numbers, and without a state that a
rollback would have to restore."""


class Aggregator(Protocol):
    """Combines n rows, by their dot products."""

    def __call__(self, gram: Tensor, weights: Sequence[float], order: Sequence[Sequence[int]]) -> Projection:
        """Returns projected rows whose sum, weighted by `weights`, is the merged gradient.

        Args:
            gram: shape (n, n), float64, CPU, symmetric.
            weights: n positive numbers.
            order: for PCGrad, the order of projections.
        """


def aggregator_of(name: str) -> Aggregator:
    """Returns the aggregator of a name; imports torchjd for all but PCGrad. Raises ImportError without it."""
    if name == PCGRAD:
        return _pcgrad
    kind, options = _WEIGHTINGS[name]
    return _Weighted(name, getattr(importlib.import_module("torchjd.aggregation"), kind)(**options))


def _pcgrad(gram: Tensor, weights: Sequence[float], order: Sequence[Sequence[int]]) -> Projection:
    del weights  # rows are projected whatever their weights
    return project(gram, order)


class _Weighted:
    """Coefficients from a weighting of torchjd. The same dot products give the same bits."""

    def __init__(self, name: str, weighting: Callable[[Any], Tensor]) -> None:
        self._name = name
        self._weighting = weighting
        self._warned = False

    @torch.no_grad()
    def __call__(self, gram: Tensor, weights: Sequence[float], order: Sequence[Sequence[int]]) -> Projection:
        conflicts, participants = count_conflicts(gram.tolist())
        factors = self._factors(gram, weights, order) if participants > 1 else None
        if factors is None:  # nothing to weigh; or a row is not finite, and then the sum is not, either
            factors = torch.eye(len(weights), dtype=torch.float64).tolist()
        return Projection(factors, conflicts, participants)

    def _factors(
        self, gram: Tensor, weights: Sequence[float], order: Sequence[Sequence[int]]
    ) -> list[list[float]] | None:
        """Returns the coefficients of the rows as the matrix of a projection; None if the rows are not finite."""
        scale = torch.tensor(weights, dtype=torch.float64)
        weighted = scale[:, None] * gram * scale
        if not bool(torch.isfinite(weighted).all()):
            return None
        # Where the mean squared length is 1: torchjd takes short rows for zeros.
        weighted = weighted / weighted.diagonal().mean()
        try:
            found = self._weighting(weighted)
        except (ArithmeticError, RuntimeError, ValueError) as error:  # a solver that fails on these numbers
            self._warn(f"{type(error).__name__}: {error}")
            return project(gram, order).coefficients
        if not bool(torch.isfinite(found).all()):
            self._warn("coefficients that are not finite")
            return project(gram, order).coefficients
        coefficients: list[list[float]] = torch.diag(found * len(weights)).tolist()
        return coefficients

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"gradients.aggregator {self._name}: PCGrad takes its place in steps where it fails ({problem})",
                stacklevel=2,
            )
