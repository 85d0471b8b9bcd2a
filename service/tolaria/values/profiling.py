"""Profiled regions of a step, and the result of a profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Region = Literal["forward", "backward", "merge", "optimizer", "boundary", "rollback"]
"""A part of a step that traces name."""

STEPS_MAX: Final = 1000
"""Steps in one profile. A trace holds every operation of each step, so longer ones cannot be viewed."""


@dataclass(frozen=True, slots=True)
class TraceWritten:
    """A trace was written to `path`; `removed` older traces were deleted to make room.

    Ending the profile and exporting the trace blocked the lane for `export_s` seconds.
    """

    path: str
    size_bytes: int
    steps: int
    export_s: float
    removed: int


@dataclass(frozen=True, slots=True)
class TraceFailed:
    """The profile left no trace; training is unaffected. `stage` is where it failed."""

    stage: Literal["start", "export", "cap"]
    reason: str
