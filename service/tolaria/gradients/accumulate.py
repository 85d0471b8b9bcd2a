"""Accumulation of the microbatches of a step into rows, in reused memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tolaria.errors import GradientMismatchError, NoGradientsError, UnknownSourceError
from tolaria.gradients.rows import OwnGradients, SourceRows


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one step.

    Attributes:
        names: the n sources, in the order of the accumulator.
        matrix: shape (n, d); rows of sources that took no part are zero. Valid until memory is lent again.
        parts: for each source, the number of microbatches that it took part in.
        microbatches: number of microbatches.
        own: sums over the microbatches.
    """

    names: tuple[str, ...]
    matrix: Tensor
    parts: tuple[int, ...]
    microbatches: int
    own: OwnGradients

    @property
    def mask(self) -> tuple[bool, ...]:
        """For each source, whether it took part."""
        return tuple(part > 0 for part in self.parts)


class SeedGradientAccumulator:
    """Adds up microbatches, one row for each source, in the order given.

    At most two matrices are lent, returned and lent again, so that steps allocate nothing. The caller scales losses
    (by 1 / microbatches for a mean). No method synchronises with the device.
    """

    def __init__(self, sources: Sequence[str], numel: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self._sources = tuple(sources)
        self._kind = (numel, dtype, device)
        self._spare: list[Tensor] = []
        self._total: Tensor | None = None
        self._parts = [0] * len(self._sources)
        self._microbatches = 0
        self._own: dict[str, tuple[Tensor | None, ...]] = {}

    def lend(self) -> Tensor:
        """Returns an uninitialised matrix (n, d) for the rows of a microbatch, to be passed to `add`."""
        if self._spare:
            return self._spare.pop()
        numel, dtype, device = self._kind
        return torch.empty(len(self._sources), numel, dtype=dtype, device=device)

    def add(self, rows: SourceRows) -> None:
        """Adds one microbatch and takes over its matrix.

        Raises:
            UnknownSourceError: rows of other sources, or in another order.
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
        _add_own(self._own, rows.own)

    def take(self) -> StepRows:
        """Returns the sum of the microbatches since the last call and starts the next step.

        Raises:
            NoGradientsError: nothing was added, or no source took part.
        """
        if self._total is None or not any(self._parts):
            self.clear()
            raise NoGradientsError
        step = StepRows(self._sources, self._total, tuple(self._parts), self._microbatches, self._own)
        self.clear()
        return step

    def clear(self) -> None:
        """Discards the microbatches since the last `take`."""
        if self._total is not None:
            self._take_back(self._total)
        self._total = None
        self._parts = [0] * len(self._sources)
        self._microbatches = 0
        self._own = {}

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
        self._own: dict[str, tuple[Tensor | None, ...]] = {}

    def lend(self) -> Tensor:
        """As `SeedGradientAccumulator.lend`."""
        return self._sums.lend()

    def add(self, rows: SourceRows) -> None:
        """Adds one microbatch as a row; raises as `SeedGradientAccumulator.add`."""
        self._sums.add(rows)
        microbatch = self._sums.take()
        self._rows.append(microbatch.matrix.sum(0))
        _add_own(self._own, microbatch.own)

    def take(self) -> StepRows:
        """Returns a row for each microbatch since the last call, named `microbatch 0` and so on.

        Raises:
            NoGradientsError: nothing was added.
        """
        if not self._rows:
            raise NoGradientsError
        count = len(self._rows)
        names = tuple(f"microbatch {number}" for number in range(count))
        step = StepRows(names, torch.stack(self._rows), (1,) * count, count, self._own)
        self.clear()
        return step

    def clear(self) -> None:
        """Discards the microbatches since the last `take`."""
        self._rows = []
        self._own = {}


def _add_own(sums: dict[str, tuple[Tensor | None, ...]], own: OwnGradients) -> None:
    for name, gradients in own.items():
        if name in sums:
            pairs = zip(sums[name], gradients, strict=True)
            sums[name] = tuple(b if a is None else a if b is None else a + b for a, b in pairs)
        else:
            sums[name] = gradients


def _check_sources(expected: tuple[str, ...], rows: SourceRows) -> None:
    for index, (name, wanted) in enumerate(zip(rows.names, expected, strict=False)):
        if name != wanted:
            raise UnknownSourceError(f"row {index} is of source {name!r}; source {wanted!r} is expected there")
    if len(rows.names) != len(expected):
        raise UnknownSourceError(f"{len(rows.names)} rows for {len(expected)} sources")
