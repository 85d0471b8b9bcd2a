"""What became of each seed, told from the statuses of a run as they come. Must not know where they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from leyline.v1.admin_service_pb2 import GetStatusResponse
from leyline.v1.enums_pb2 import (
    SEED_STAGE_BLENDING,
    SEED_STAGE_CULLED,
    SEED_STAGE_DORMANT,
    SEED_STAGE_EMBARGOED,
    SEED_STAGE_FOSSILIZED,
    SEED_STAGE_GERMINATED,
    SEED_STAGE_PROBATIONARY,
    SEED_STAGE_RESETTING,
    SEED_STAGE_SHADOWING,
    SEED_STAGE_TERMINATED,
    SEED_STAGE_TRAINING,
)
from leyline.v1.seeds_pb2 import SeedState
from tolaria.cli import words

_UNHEARD = frozenset({SEED_STAGE_GERMINATED, SEED_STAGE_TRAINING})
_HEARD = frozenset({SEED_STAGE_BLENDING, SEED_STAGE_SHADOWING, SEED_STAGE_PROBATIONARY})
_PART_OF_HOST = frozenset({SEED_STAGE_FOSSILIZED, SEED_STAGE_TERMINATED})
_TAKEN_OUT = frozenset({SEED_STAGE_CULLED, SEED_STAGE_EMBARGOED, SEED_STAGE_RESETTING, SEED_STAGE_DORMANT})


@dataclass(slots=True)
class Story:
    """One seed so far. Epochs are those begun, from 1; accuracies the validation's, from 0 to 1; None: unknown."""

    seed_id: str
    blueprint_id: str
    stage: int
    epoch_germinated: int | None = None
    epoch_ended: int | None = None
    """When it became part of the host or was taken out; None while it lives."""
    accuracy_before: float | None = None
    """The latest before it had any effect."""
    accuracy_after: float | None = None
    """The one when it ended, or the latest; None for a seed that never had an effect."""


class Stories:
    """Every seed that any status has shown, the first seen first."""

    def __init__(self) -> None:
        self._by_id: dict[str, Story] = {}

    def see(self, status: GetStatusResponse) -> None:
        """Take in the next status."""
        accuracy = _validated(status)
        for seed in status.seeds:
            story = self._story(seed, status.epoch)
            story.stage = seed.stage
            if seed.stage in _UNHEARD:
                story.accuracy_before, story.accuracy_after, story.epoch_ended = accuracy, None, None
            elif seed.stage in _HEARD:
                story.accuracy_after, story.epoch_ended = accuracy, None
            elif story.epoch_ended is None:
                story.epoch_ended = status.epoch
                # A seed that is taken out before it blended has left no mark on any figure.
                if seed.stage in _PART_OF_HOST or story.accuracy_after is not None:
                    story.accuracy_after = accuracy

    def all(self) -> list[Story]:
        """The stories as they stand."""
        return list(self._by_id.values())

    def of(self, seed_id: str) -> Story | None:
        """One seed's story; None for a seed that no status has shown."""
        return self._by_id.get(seed_id)

    def _story(self, seed: SeedState, epoch: int) -> Story:
        story = self._by_id.get(seed.seed_id)
        # A seed at rest may be germinated once more: that is another life.
        reborn = story is not None and story.stage in _TAKEN_OUT and seed.stage == SEED_STAGE_GERMINATED
        if story is None or reborn:
            germinated = epoch if seed.stage in _UNHEARD else None
            story = self._by_id[seed.seed_id] = Story(seed.seed_id, seed.blueprint_id, seed.stage, germinated)
        return story


def story_line(story: Story) -> str:
    """A seed's story for people, on one line."""
    name = words.one_line(f"{story.seed_id} {story.blueprint_id}")
    begun = "germinated unseen" if story.epoch_germinated is None else f"epoch {story.epoch_germinated} germinated"
    return f"{name}: {begun}, {_end(story)}; {_effect(story)}"


def _end(story: Story) -> str:
    if story.epoch_ended is None:
        return f"{words.stage_word(story.stage)} at the end"
    return f"{story.epoch_ended} {'fossilized' if story.stage in _PART_OF_HOST else 'culled'}"


def _effect(story: Story) -> str:
    if story.accuracy_after is None:
        return "it did not blend"
    before = "unknown" if story.accuracy_before is None else f"{story.accuracy_before:.2%}"
    when = "at the end" if story.epoch_ended is None else "when it was culled"
    when = "after" if story.stage in _PART_OF_HOST else when
    return f"accuracy {before} before it blended, {story.accuracy_after:.2%} {when}"


def _validated(status: GetStatusResponse) -> float | None:
    """The latest validation accuracy; before the first validation both of its figures are the contract's zero."""
    if not math.isfinite(status.validation_accuracy):
        return None
    return status.validation_accuracy if status.validation_loss or status.validation_accuracy else None
