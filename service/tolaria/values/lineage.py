"""Lineages: which restore points are ancestors of a training state, in the tree that rollbacks make of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass

FIRST_ATTEMPT = 1


@dataclass(frozen=True, slots=True)
class Lineage:
    """The ancestors of a state: an *attempt* is a stretch of training without a rollback; each rollback begins one.

    Attributes:
        attempt: the attempt that the state belongs to, from 1; numbers rise with every rollback of the run.
        forks: earlier attempts, each with the last of its steps that led to this state; steps ascend.
    """

    attempt: int = FIRST_ATTEMPT
    forks: tuple[tuple[int, int], ...] = ()

    def includes(self, attempt: int, global_step: int) -> bool:
        """Whether a point of that attempt and step is an ancestor of the state, or the state itself."""
        return attempt == self.attempt or any(attempt == a and global_step <= last for a, last in self.forks)

    def attempt_at(self, global_step: int) -> int:
        """Returns the attempt in which the lineage passed a step."""
        return next((attempt for attempt, last in self.forks if global_step <= last), self.attempt)

    def at(self, global_step: int) -> Lineage:
        """Returns the lineage of the ancestor at a step."""
        attempt = self.attempt_at(global_step)
        return Lineage(attempt, tuple(fork for fork in self.forks if fork[1] < global_step))

    def back_to(self, global_step: int, attempt: int) -> Lineage:
        """Returns the lineage of the new attempt that begins at an earlier step of this one."""
        kept: list[tuple[int, int]] = []
        for fork in (*self.forks, (self.attempt, global_step)):
            if fork[1] >= global_step:
                # Attempts that made no step leave no trace; else a run in a circle would grow without bound.
                if not kept or kept[-1][1] < global_step:
                    kept.append((fork[0], global_step))
                break
            kept.append(fork)
        return Lineage(attempt, tuple(kept))

    def to_json(self) -> str:
        """Returns the forks as JSON; the attempt is stored beside them. Empty without forks."""
        return json.dumps(self.forks, separators=(",", ":")) if self.forks else ""

    @classmethod
    def of(cls, attempt: int, forks: str) -> Lineage:
        """Returns the lineage for an attempt and what `to_json` returned. Raises ValueError for another text."""
        found = json.loads(forks) if forks else []
        return cls(attempt, tuple((int(a), int(last)) for a, last in found))


@dataclass(frozen=True, slots=True)
class BranchOrigin:
    """The restore point that a run has begun from: the state directory of another run, and its checkpoint there."""

    run_id: str
    checkpoint_id: str
    global_step: int
    digest: str
    directory: str

    @classmethod
    def from_json(cls, text: str) -> BranchOrigin:
        """Returns the origin that the journal records as JSON. Raises TypeError or ValueError for another text."""
        return cls(**json.loads(text))
