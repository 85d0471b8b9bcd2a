"""Writing learning rates into param groups, and noticing when somebody else did.

Owns the memory of what was last written. Knows nothing of which rate is right. Waits for a device only where a tensor
that holds a rate was written to by somebody else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tolaria.optimization.groups import ParamGroup, name_of
from tolaria.values.optimization import LearningRateViolation

RELATIVE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class _Written:
    """What a group was last given.

    A tensor's version counts the writes to it without a look at its device, except those through `.data`; a tensor on
    the host is looked at, so only on a device can a write through `.data` go unseen.
    """

    rate: float
    tensor: Tensor | None = None
    version: int = 0
    stored: float | None = None

    def still_in(self, group: ParamGroup) -> bool:
        present = group.get("lr")
        if isinstance(present, Tensor):
            return present is self.tensor and (_version(present), _cheap_value(present)) == (self.version, self.stored)
        return self.tensor is None and bool(present == self.rate)


class RateWriter:
    """The hand that writes `lr`. A group whose rate is a tensor (as captured steps need) has it filled in place."""

    def __init__(self) -> None:
        self._written: dict[str, _Written] = {}

    @property
    def rates(self) -> dict[str, float]:
        """What was last written, by group."""
        return {name: written.rate for name, written in self._written.items()}

    def write(self, group: ParamGroup, rate: float) -> None:
        """Make `rate` the group's, unless it is already."""
        written = self._written.get(name_of(group))
        if written is None or written.rate != rate or not written.still_in(group):
            self._put(group, rate)

    def put_back(self, group: ParamGroup) -> LearningRateViolation | None:
        """Restore what was last written. None when nothing was yet, or what is there is within 1e-6 of it."""
        written = self._written.get(name_of(group))
        if written is None or written.still_in(group):
            return None
        found = rate_in(group)
        self._put(group, written.rate)
        if math.isclose(found, written.rate, rel_tol=RELATIVE_TOLERANCE):
            return None
        return LearningRateViolation(name_of(group), written.rate, found)

    def forget(self, name: str) -> None:
        """Know nothing any more of a group that is gone."""
        self._written.pop(name, None)

    def _put(self, group: ParamGroup, rate: float) -> None:
        name = name_of(group)
        written = self._written.get(name)
        tensor = None if written is None else written.tensor
        if written is None and isinstance(group.get("lr"), Tensor):
            tensor = group["lr"].detach().clone()  # torch lets all groups share the default's tensor
        if tensor is None:
            group["lr"] = rate
            self._written[name] = _Written(rate)
        else:
            tensor.fill_(rate)
            group["lr"] = tensor
            self._written[name] = _Written(rate, tensor, _version(tensor), _cheap_value(tensor))


def rate_in(group: ParamGroup) -> float:
    """The group's rate as a number; NaN where it is none. Reads a tensor, which waits for its device."""
    present = group.get("lr")
    if isinstance(present, Tensor) and present.numel() == 1:
        return float(present.item())
    return float(present) if isinstance(present, (int, float)) else math.nan


def _version(tensor: Tensor) -> int:
    return tensor._version  # noqa: SLF001 - the only sign of a write that does not need a read


def _cheap_value(tensor: Tensor) -> float | None:
    """What it holds, in its own precision; None on a device."""
    return float(tensor.item()) if tensor.device.type == "cpu" else None
