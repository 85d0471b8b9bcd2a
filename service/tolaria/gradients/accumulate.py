"""Microbatches into the rows of one step. Owns the memory that rows live in; knows nothing of weights or merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from tolaria.errors import GradientMismatchError, NoGradientsError, UnknownSourceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tolaria.gradients.rows import SourceRows

OwnGradients: TypeAlias = "Mapping[str, tuple[Tensor | None, ...]]"
"""By source, the gradients over the parameters that only it owns; None where its loss reaches one never."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one step.

    Attributes:
        names: the n sources, in the order of the accumulator.
        matrix: shape (n, d); zeros in rows of sources that took no part. Valid until memory is lent again.
        parts: for each source, the number of microbatches that it took part in.
        microbatches: how many there were.
        own: sums over the microbatches.
    """

    names: tuple[str, ...]
    matrix: Tensor
    parts: tuple[int, ...]
    microbatches: int
    own: OwnGradients

    @property
    def mask(self) -> tuple[bool, ...]:
        """For each source, whether it took part at all."""
        return tuple(part > 0 for part in self.parts)


class SeedGradientAccumulator:
    """Adds up microbatches: one row for each source, always all sources in the order given.

    Matrices are lent, taken back and lent again (two at most), so that steps allocate nothing, and rows are written
    once when there is one microbatch. Losses are to be scaled by the caller (by 1 / microbatches for a mean). Nothing
    here waits for the device.
    """

    def __init__(self, sources: Sequence[str], numel: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self._sources = tuple(sources)
        self._kind = (numel, dtype, device)
        self._spare: list[Tensor] = []
        self._total: Tensor | None = None
        self._parts = [0] * len(self._sources)
        self._microbatches = 0
        self._own = _OwnSums()

    @property
    def sources(self) -> tuple[str, ...]:
        """Whose rows these are, in order."""
        return self._sources

    def lend(self) -> Tensor:
        """A matrix (n, d) with anything in it, to write a microbatch's rows into and hand over with `add`."""
        if self._spare:
            return self._spare.pop()
        numel, dtype, device = self._kind
        return torch.empty(len(self._sources), numel, dtype=dtype, device=device)

    def add(self, rows: SourceRows) -> None:
        """Add one microbatch. Its matrix belongs to the accumulator from now on.

        Raises:
            UnknownSourceError: rows for other sources, or in another order.
            GradientMismatchError: rows of another length, dtype or device.
        """
        _check_sources(self._sources, rows)
        self._check_kind(rows.matrix)
        if self._total is None:
            self._total = rows.matrix
        else:
            self._total.add_(rows.matrix)
            self._take_back(rows.matrix)
        self._parts = [part + here for part, here in zip(self._parts, rows.present, strict=True)]
        self._microbatches += 1
        self._own.add(rows.own)

    def take(self) -> StepRows:
        """All that was added since the last time, which starts the next step.

        Raises:
            NoGradientsError: nothing was added, or no source took part.
        """
        if self._total is None or not any(self._parts):
            self.clear()
            raise NoGradientsError
        step = StepRows(self._sources, self._total, tuple(self._parts), self._microbatches, self._own.take())
        self.clear()
        return step

    def clear(self) -> None:
        """Forget what was added since the last `take`."""
        if self._total is not None:
            self._take_back(self._total)
        self._total = None
        self._parts = [0] * len(self._sources)
        self._microbatches = 0
        self._own = _OwnSums()

    def _check_kind(self, matrix: Tensor) -> None:
        numel, dtype, device = self._kind
        expected = (len(self._sources), numel)
        if tuple(matrix.shape) != expected:
            raise GradientMismatchError(0, f"rows of shape {tuple(matrix.shape)}, not {expected}")
        if matrix.dtype != dtype or matrix.device != torch.device(device):
            raise GradientMismatchError(0, f"{matrix.dtype} on {matrix.device}, not {dtype} on {device}")

    def _take_back(self, matrix: Tensor) -> None:
        self._spare = [*self._spare, matrix][-2:]


class MicrobatchAccumulator:
    """Keeps microbatches apart: one row for each, the sum of its sources' rows. Does not synchronise."""

    def __init__(self, sources: Sequence[str], numel: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self._sums = SeedGradientAccumulator(sources, numel, dtype=dtype, device=device)
        self._rows: list[Tensor] = []
        self._own = _OwnSums()

    def lend(self) -> Tensor:
        """As `SeedGradientAccumulator.lend`."""
        return self._sums.lend()

    def add(self, rows: SourceRows) -> None:
        """Add one microbatch as a row of its own; raises as `SeedGradientAccumulator.add`."""
        self._sums.add(rows)
        alone = self._sums.take()
        self._rows.append(alone.matrix.sum(0))
        self._own.add(alone.own)

    def take(self) -> StepRows:
        """A row for each microbatch since the last time, named `microbatch 0` and so on.

        Raises:
            NoGradientsError: nothing was added.
        """
        if not self._rows:
            raise NoGradientsError
        count = len(self._rows)
        names = tuple(f"microbatch {number}" for number in range(count))
        step = StepRows(names, torch.stack(self._rows), (1,) * count, count, self._own.take())
        self.clear()
        return step

    def clear(self) -> None:
        """Forget what was added since the last `take`."""
        self._rows = []
        self._own = _OwnSums()


class _OwnSums:
    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | None, ...]] = {}

    def add(self, own: OwnGradients) -> None:
        for name, gradients in own.items():
            before = self._sums.get(name)
            self._sums[name] = gradients if before is None else _add_pairwise(before, gradients)

    def take(self) -> OwnGradients:
        return self._sums


def _add_pairwise(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True))


def _check_sources(expected: tuple[str, ...], rows: SourceRows) -> None:
    for index, (name, wanted) in enumerate(zip(rows.names, expected, strict=False)):
        if name != wanted:
            raise UnknownSourceError(f"row {index} is of source {name!r}; source {wanted!r} is expected there")
    if len(rows.names) != len(expected):
        raise UnknownSourceError(f"{len(rows.names)} rows for {len(expected)} sources")
