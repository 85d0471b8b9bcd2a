from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from support.runs import FakePeers, new_run, running

pytestmark = pytest.mark.anyio


class Counting:
    """Hearts that count the beats."""

    def __init__(self) -> None:
        self.beats = 0

    def lane_beat(self) -> None:
        self.beats += 1

    @contextmanager
    def lane_works(self) -> Iterator[None]:
        yield

    @contextmanager
    def lane_rests(self) -> Iterator[None]:
        yield


@pytest.mark.parametrize("accumulate", [1, 4])
async def test_the_lane_beats_with_every_update_and_every_microbatch(accumulate: int) -> None:
    """However few microbatches an update has: an epoch may be longer than the sentinel has patience."""
    run = new_run(FakePeers(), epochs=1, accumulate=accumulate)
    hearts = run.parts.link._lane._hearts = Counting()
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
    updates = 8 // accumulate
    validated = 1
    fences = updates + 1  # and one more at which no batch is left
    between = updates * (accumulate - 1)
    assert hearts.beats >= fences + between + validated
