"""Where in the data steps are."""

from __future__ import annotations

import pytest

from tolaria.errors import InvalidFieldError
from tolaria.lane.messages import StepDone
from tolaria.run.step_places import StepPlaces
from tolaria.values.training import BatchRange, EpochProgress, merged


def done(step: int, batches: range, *, epoch: int = 1, skipped: bool = False) -> StepDone:
    """A step."""
    return StepDone(step, epoch, 1.0, 1.0, 8, 0.1, 0.0, 0.0, skipped=skipped, batches=batches)


def places(size: int = 2, *, epoch_steps: int = 5) -> StepPlaces:
    """Places of a new run."""
    made = StepPlaces(size)
    made.begin(EpochProgress(), 0, epoch_steps)
    return made


def test_steps_that_were_taken_have_their_batches() -> None:
    """Batches of a skipped step belong to none; a step that left batches out before it has these too."""
    found = places()
    for step in (done(1, range(2)), done(1, range(2, 4), skipped=True), done(2, range(4, 6)), done(3, range(6, 10))):
        found.step(step)
    found.step(done(4, range(10, 11)))
    found.step(done(5, range(2), epoch=2))
    ranges = [found.of(step) for step in range(1, 6)]
    assert ranges[:3] == [BatchRange(1, 0, 1), BatchRange(1, 4, 5), BatchRange(1, 6, 9)]
    assert (ranges[3].first, ranges[4]) == (10, BatchRange(2, 0, 1))
    assert found.reached == (2, 2)


def test_later_steps_have_those_that_they_take_if_none_is_skipped() -> None:
    """In this epoch, and in those after it, each of which has three steps of which the last may be shorter."""
    found = places(epoch_steps=3)
    found.step(done(1, range(2)))
    assert [found.of(step) for step in (2, 3, 4, 6, 7)] == [
        BatchRange(1, 2, 3), BatchRange(1, 4, 5), BatchRange(2, 0, 1), BatchRange(2, 4, 5), BatchRange(3, 0, 1),
    ]  # fmt: skip


def test_undone_steps_stay_known_until_others_have_their_numbers() -> None:
    """After a rollback an operator names steps as the curve shows them."""
    found = places()
    found.step(done(1, range(2)))
    found.step(done(1, range(2, 4), skipped=True))
    found.step(done(2, range(4, 6)))
    found.step(done(3, range(6, 8)))
    found.rewound(EpochProgress(1, over=False, batches=2, steps=1), 1)
    assert found.of(3) == BatchRange(1, 6, 7)
    found.step(done(2, range(2, 4)))
    assert [found.of(step) for step in (2, 3)] == [BatchRange(1, 2, 3), BatchRange(1, 6, 7)]
    found.step(done(3, range(4, 6)))
    assert found.of(3) == BatchRange(1, 4, 5)


def test_a_later_process_knows_the_steps_of_a_run_that_has_skipped_none() -> None:
    """If one was skipped, the steps of this epoch, or all of them, are refused with the way out."""
    found = StepPlaces(1)
    found.begin(EpochProgress(3, over=False, batches=2, steps=2), 12, 5)
    assert [found.of(step) for step in (1, 6, 12)] == [BatchRange(1, 0, 0), BatchRange(2, 0, 0), BatchRange(3, 1, 1)]
    found.begin(EpochProgress(3, over=False, batches=2, steps=2), 11, 5)
    assert found.of(11) == BatchRange(3, 1, 1)
    found.begin(EpochProgress(3, over=False, batches=3, steps=2), 12, 5)
    for step in (9, 12):
        with pytest.raises(InvalidFieldError, match="--epoch"):
            found.of(step)
    assert found.of(13) == BatchRange(3, 3, 3)


def test_ranges_are_merged() -> None:
    """Neighbours and overlaps of one epoch become one range."""
    given = [BatchRange(2, 0, 1), BatchRange(1, 5, 6), BatchRange(1, 0, 2), BatchRange(1, 3, 3), BatchRange(1, 6, 9)]
    assert merged(given) == (BatchRange(1, 0, 3), BatchRange(1, 5, 9), BatchRange(2, 0, 1))
