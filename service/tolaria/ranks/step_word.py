"""What a rank adds to the sums of a step, as numbers that travel with the gradients.

Each rank has a slot, to which the others add zeros, so that every rank learns the exact numbers of all of them, also
where the gradients are float32: of float64 values the slot has the rounded ones, and what rounding has left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from tolaria.errors import RankFailedError, RanksDifferError

WORLD_MAX: Final = 64
"""Ranks up to which slots are small beside gradients."""

DTYPES: Final = frozenset({torch.float32, torch.float64})
"""Those that hold integers up to `COMPARED` exactly."""

COMPARED: Final = 2**20
"""Numbers that have to match are compared modulo this one, so that squares are exact in float64."""


class StepWord:
    """The numbers of one rank in one step.

    Args:
        rank: of this process, of `world`.
        values: to be summed, in float64.
        must_match: integers that are equal on all ranks, by what they are.
        failed: whether this rank reports a failure instead.
    """

    def __init__(
        self, rank: int, world: int, values: Sequence[float], must_match: Mapping[str, int], *, failed: bool = False
    ) -> None:
        self._rank, self._world, self._must_match = rank, world, must_match
        self._values, self.failed = values, failed
        self._places = [number % COMPARED for number in must_match.values()]

    @property
    def numbers(self) -> int:
        """How many numbers the slots of all ranks have."""
        return self._world * (1 + 2 * len(self._values) + len(self._places))

    def write(self, slots: Tensor) -> None:
        """Writes this rank's slot into zeros of shape (numbers,), of one of `DTYPES`."""
        rest = [0.0] * len(self._values)
        if slots.dtype != torch.float64:
            rounded = torch.tensor(self._values, dtype=slots.dtype).tolist()
            pairs = zip(self._values, rounded, strict=True)
            rest = [value - near if math.isfinite(value - near) else 0.0 for value, near in pairs]
        own = [float(self.failed), *self._values, *rest, *self._places]
        slots.view(self._world, -1)[self._rank] = torch.tensor(own, dtype=slots.dtype)

    def sums(self, slots: Tensor) -> list[float]:
        """Returns the sums of the values over all ranks, in their order, given the summed slots.

        Raises:
            RankFailedError: another rank has failed, and this one has not.
            RanksDifferError: names the first number that differs.
        """
        rows: list[list[float]] = slots.view(self._world, -1).tolist()
        if self.failed:
            return [0.0] * len(self._values)
        if any(row[0] for row in rows):
            raise RankFailedError("a pass has raised an exception on another rank")
        count = len(self._values)
        for number, (name, place) in enumerate(zip(self._must_match, self._places, strict=True), 1 + 2 * count):
            if any(row[number] != place for row in rows):
                raise RanksDifferError(f"{name}: {self._must_match[name]} on rank {self._rank}, but not on every rank")
        return [sum(row[1 + value] + row[1 + count + value] for row in rows) for value in range(count)]
