"""Accumulates the microbatches of a step into rows, in reused memory."""

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
        names: the names of the n rows: sources in the order of the accumulator, or microbatches.
        matrix: shape (n, d); rows of sources without a loss are zero. Valid until the next call of `lend`.
        parts: for each row, the number of microbatches in it.
        microbatches: the number of microbatches in the step.
        own: gradients over the sources' own parameters, summed over the microbatches.
    """

    names: tuple[str, ...]
    matrix: Tensor
    parts: tuple[int, ...]
    microbatches: int
    own: OwnGradients


class SeedGradientAccumulator:
    """Accumulates the rows of a step's microbatches.

    Two matrices are reused, so that steps allocate nothing. The caller scales losses (by 1 / microbatches for a mean).
    No method synchronises with the device.

    Args:
        sources: the n sources.
        numel: the length d of their rows.
        dtype: the dtype of the rows.
        device: the device of the rows.
        by_microbatch: False: a row for each source, the sum of its microbatches. True: a row for each microbatch, the
            sum of its sources.
    """

    def __init__(
        self,
        sources: Sequence[str],
        numel: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        by_microbatch: bool = False,
    ) -> None:
        self._sources = tuple(sources)
        self._shape = (len(self._sources), numel)
        self._dtype, self._device = dtype, torch.device(device)
        self._by_microbatch = by_microbatch
        self._spare: list[Tensor] = []
        self._total: Tensor | None = None
        self._microbatch_rows: list[Tensor] = []
        self._parts = [0] * len(self._sources)
        self._microbatches = 0
        self._own: dict[str, tuple[Tensor | None, ...]] = {}

    def lend(self) -> Tensor:
        """Returns an uninitialised matrix (n, d) for the rows of a microbatch, to be passed to `add`."""
        return self._spare.pop() if self._spare else torch.empty(self._shape, dtype=self._dtype, device=self._device)

    def add(self, rows: SourceRows) -> None:
        """Adds one microbatch and takes over its matrix.

        Raises:
            UnknownSourceError: rows of other sources, or in another order.
            GradientMismatchError: rows of another length, dtype or device.
        """
        self._check(rows)
        if self._by_microbatch:
            self._microbatch_rows.append(rows.matrix.sum(0))
            self._take_back(rows.matrix)
        elif self._total is None:
            self._total = rows.matrix
        else:
            self._total.add_(rows.matrix)
            self._take_back(rows.matrix)
        self._parts = [part + here for part, here in zip(self._parts, rows.present, strict=True)]
        self._microbatches += 1
        for name, gradients in rows.own.items():
            pairs = zip(self._own.get(name, (None,) * len(gradients)), gradients, strict=True)
            self._own[name] = tuple(b if a is None else a if b is None else a + b for a, b in pairs)

    def take(self) -> StepRows:
        """Returns the rows accumulated since the last call and starts the next step.

        Rows of microbatches are named `microbatch 0` and so on.

        Raises:
            NoGradientsError: nothing was added, or no source had a loss.
        """
        if not any(self._parts):
            self.clear()
            raise NoGradientsError
        count = self._microbatches
        if self._total is None:
            names = tuple(f"microbatch {number}" for number in range(count))
            step = StepRows(names, torch.stack(self._microbatch_rows), (1,) * count, count, self._own)
        else:
            step = StepRows(self._sources, self._total, tuple(self._parts), count, self._own)
        self.clear()
        return step

    def clear(self) -> None:
        """Discards the microbatches since the last `take`."""
        if self._total is not None:
            self._take_back(self._total)
        self._total = None
        self._microbatch_rows = []
        self._parts = [0] * len(self._sources)
        self._microbatches = 0
        self._own = {}

    def _check(self, rows: SourceRows) -> None:
        for index, (name, wanted) in enumerate(zip(rows.names, self._sources, strict=False)):
            if name != wanted:
                raise UnknownSourceError(f"row {index} is of source {name!r}; source {wanted!r} is expected there")
        if len(rows.names) != len(self._sources):
            raise UnknownSourceError(f"{len(rows.names)} rows for {len(self._sources)} sources")
        shape, dtype, device = tuple(rows.matrix.shape), rows.matrix.dtype, rows.matrix.device
        if shape != self._shape:
            raise GradientMismatchError(0, f"rows of shape {shape}, not {self._shape}")
        if (dtype, device) != (self._dtype, self._device):
            raise GradientMismatchError(0, f"{dtype} on {device}, not {self._dtype} on {self._device}")

    def _take_back(self, matrix: Tensor) -> None:
        self._spare = [*self._spare, matrix][-2:]
