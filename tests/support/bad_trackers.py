"""Trackers that raise, hang or are slow, and how a service finds them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import JsonValue

from tolaria.trackers import Note, Point, Rewind, TrackedRun, TrackerState


class QuietTracker:
    """Takes everything."""

    package: ClassVar[str] = ""
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: Mapping[str, JsonValue]) -> None:
        self.state: TrackerState | None = None

    def open(self, run: TrackedRun, state: TrackerState) -> None:
        self.state = state

    def log(self, points: Sequence[Point]) -> None: ...

    def rewind(self, to: Rewind) -> None: ...

    def annotate(self, notes: Sequence[Note]) -> None: ...

    def close(self, outcome: str) -> None: ...


class RaisingTracker(QuietTracker):
    """Raises until a file appears in its directory."""

    def log(self, points: Sequence[Point]) -> None:
        assert self.state is not None
        if not (self.state.directory / "mended").exists():
            raise ConnectionError("the tracking server is away")


class HangingTracker(QuietTracker):
    """Never returns, not even at the end."""

    def log(self, points: Sequence[Point]) -> None:
        time.sleep(3600)


def installed_in(directory: Path) -> None:
    """Makes both known by their entry points to processes that have the directory on their path."""
    info = directory / "bad_trackers-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-trackers\nVersion: 1\n")
    names = {"raising": "RaisingTracker", "hanging": "HangingTracker", "quiet": "QuietTracker"}
    lines = [f"{name} = support.bad_trackers:{kind}" for name, kind in names.items()]
    (info / "entry_points.txt").write_text("[tolaria.trackers]\n" + "\n".join(lines) + "\n")
