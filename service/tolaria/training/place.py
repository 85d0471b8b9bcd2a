"""Where a run stands in its data: the epoch, what that has come to, and which batches are left out. Part of the state.

Owned by the lane. Must not know tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import cast

from pydantic import JsonValue


@dataclass(slots=True)
class EpochPlace:
    """The epoch that goes on, or went on last. `batches` counts what the cursor has given; sums are over steps."""

    number: int = 0
    over: bool = True
    batches: int = 0
    steps: int = 0
    void_steps: int = 0
    samples: int = 0
    loss_sum: float = 0.0

    @property
    def loss(self) -> float:
        """Mean loss of the finite steps; NaN before the first."""
        return self.loss_sum / self.steps if self.steps else float("nan")

    def begin(self, number: int) -> None:
        """A new epoch."""
        self.load_state_dict(asdict(EpochPlace(number, over=False)))

    def count(self, loss: float, samples: int, *, void: bool) -> None:
        """One more step; of void ones only the number and the samples count."""
        self.samples += samples
        if void:
            self.void_steps += 1
        else:
            self.steps += 1
            self.loss_sum += loss

    def state_dict(self) -> dict[str, JsonValue]:
        """All of it."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, JsonValue]) -> None:
        """Become what `state_dict` told. Raises KeyError where something is missing; nothing has changed then."""
        values = [(entry.name, state[entry.name]) for entry in fields(self)]
        for name, value in values:
            setattr(self, name, value)


@dataclass(slots=True)
class LeftOut:
    """Batches that training passes over since they have spoiled it: (epoch, place in the epoch, from 0)."""

    batches: set[tuple[int, int]] = field(default_factory=set)

    def holds(self, epoch: int, place: int) -> bool:
        """Whether this one is left out."""
        return (epoch, place) in self.batches

    def state_dict(self) -> dict[str, JsonValue]:
        """In order, so that equal sets have equal digests."""
        return {"batches": [[epoch, place] for epoch, place in sorted(self.batches)]}

    def load_state_dict(self, state: Mapping[str, JsonValue]) -> None:
        """Become what `state_dict` told. Raises KeyError, TypeError or ValueError when it is no such thing."""
        listed = cast("list[tuple[int, int]]", state["batches"])
        self.batches = {(int(epoch), int(place)) for epoch, place in listed}
