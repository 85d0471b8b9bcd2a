"""Why gradients cannot be merged. Must not know tensors."""

from __future__ import annotations

from tolaria.errors.base import TolariaError


class GradientError(TolariaError):
    """Base of the reasons why gradients cannot be merged."""


class NoGradientsError(GradientError):
    """Raised when there is nothing to merge: no rows, or rows without elements."""

    def __init__(self) -> None:
        super().__init__("no gradients available for aggregation")


class GradientMismatchError(GradientError):
    """Raised when one gradient differs in dtype, device, shape or count from what it must match.

    `index` is the position of the first offender among those given.
    """

    def __init__(self, index: int, detail: str) -> None:
        self.index = index
        super().__init__(f"gradient {index}: {detail}")


class GradientWeightError(GradientError):
    """Raised when weights cannot be used. `index` is the first offender, None when it is all of them together."""

    def __init__(self, index: int | None, detail: str) -> None:
        self.index = index
        super().__init__(f"weights: {detail}" if index is None else f"weight {index}: {detail}")


class UnknownSourceError(GradientError):
    """Raised when a row or loss names a source that takes no part in this step, or one that does is missing."""
