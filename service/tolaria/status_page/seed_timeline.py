"""The seeds of a run over its steps: the stages that each has been in, and its alpha."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from leyline.v1.seeds_pb2 import SeedState
from tolaria.run.seed_telemetry import stage_name
from tolaria.status_page.curves import Curve
from tolaria.values.seeds import alpha_at, declared_ramp

SEEDS_MAX: Final = 64
"""Seeds that are remembered: beyond it, those that have been gone for the longest time are forgotten."""

STAGES_MAX: Final = 16
"""Stages of one seed that are remembered, the latest ones."""

_ALPHA_POINTS: Final = 32


@dataclass(slots=True)
class StageSpan:
    """A stage and the steps in which a seed has been in it; `end` is None while it is."""

    stage: str
    begin: int
    end: int | None = None


@dataclass(slots=True)
class SeedTrack:
    """What is remembered of one seed. `state` is the newest; None once the seed is gone."""

    seed_id: str
    blueprint: str
    slot: str
    state: SeedState | None
    spans: list[StageSpan] = field(default_factory=list)
    alpha: Curve = field(default_factory=lambda: Curve(_ALPHA_POINTS))

    def enter(self, stage: str, step: int) -> None:
        """Begins a stage, unless the seed is in it."""
        if self.spans and self.spans[-1].end is None:
            if self.spans[-1].stage == stage:
                return
            self.leave(step)
        self.spans.append(StageSpan(stage, step))
        del self.spans[:-STAGES_MAX]

    def leave(self, step: int) -> None:
        """Ends the stage that the seed is in, if any."""
        if self.spans and self.spans[-1].end is None:
            self.spans[-1].end = step

    def rewind(self, step: int) -> None:
        """Forgets what happened after a step."""
        self.spans = [span for span in self.spans if span.begin <= step]
        if self.spans and self.spans[-1].end is not None and self.spans[-1].end > step:
            self.spans[-1].end = None
        self.alpha.rewind(step)

    def current_alpha(self, step: int) -> float:
        """Returns alpha at a step: that of the schedule, which begins when the seed is in the model."""
        if self.state is None or "alpha" not in self.state.metrics:
            return 0.0  # not in the model
        return alpha_at(self.state.stage, declared_ramp(self.state), step)


class SeedTimeline:
    """The seeds of a run, in the order in which they first appeared."""

    def __init__(self) -> None:
        self.tracks: dict[str, SeedTrack] = {}

    def update(self, states: Iterable[SeedState], step: int) -> None:
        """Takes over all current seeds at a step; the others are gone."""
        present = set()
        for state in states:
            present.add(state.seed_id)
            track = self.tracks.get(state.seed_id)
            if track is None:
                track = SeedTrack(state.seed_id, state.blueprint_id, state.slot, state)
                self.tracks[state.seed_id] = track
            track.state = SeedState()
            track.state.CopyFrom(state)
            track.blueprint, track.slot = state.blueprint_id or track.blueprint, state.slot or track.slot
            track.enter(stage_name(state.stage), step)
            track.alpha.add(step, track.current_alpha(step))
        for seed_id, track in self.tracks.items():
            if seed_id not in present and track.state is not None:
                track.state = None
                track.leave(step)
        self._forget()

    def advance(self, step: int) -> None:
        """Notes the alpha of the seeds in the model at a step."""
        for track in self.tracks.values():
            if track.state is not None and track.state.HasField("alpha"):
                track.alpha.add(step, track.current_alpha(step))

    def rewind(self, step: int) -> None:
        """Forgets what happened after a step, and seeds that appeared after it."""
        for track in self.tracks.values():
            track.rewind(step)
        self.tracks = {seed_id: track for seed_id, track in self.tracks.items() if track.spans}

    def _forget(self) -> None:
        gone = sorted(
            (track for track in self.tracks.values() if track.state is None),
            key=lambda track: track.spans[-1].end or 0,
        )
        for track in gone[: max(0, len(self.tracks) - SEEDS_MAX)]:
            del self.tracks[track.seed_id]
        for seed_id in list(self.tracks)[SEEDS_MAX:]:  # that many grow at the same time
            del self.tracks[seed_id]
