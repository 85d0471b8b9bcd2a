from __future__ import annotations

import math

import pytest

from tolaria.training.place import EpochPlace, LeftOut


def test_it_counts_steps_and_void_steps_apart() -> None:
    """The loss is the mean over finite steps; void ones count by number and samples only."""
    place = EpochPlace()
    place.begin(3)
    place.count(2.0, 8, void=False)
    place.count(math.nan, 8, void=True)
    place.count(4.0, 5, void=False)
    assert (place.steps, place.void_steps, place.samples, place.loss) == (2, 1, 21, 3.0)


def test_there_is_no_loss_before_the_first_finite_step() -> None:
    """Void steps have none."""
    place = EpochPlace()
    place.count(math.nan, 8, void=True)
    assert math.isnan(place.loss)


def test_a_new_epoch_begins_with_nothing() -> None:
    """All that the last one came to is gone."""
    place = EpochPlace(1, over=True, batches=8, steps=7, void_steps=1, samples=64, loss_sum=3.5)
    place.begin(2)
    assert place == EpochPlace(2, over=False)


def test_a_place_becomes_what_was_saved() -> None:
    """Every field comes back; a state that lacks one is refused and changes nothing."""
    saved = EpochPlace(4, over=False, batches=9, steps=7, void_steps=1, samples=64, loss_sum=3.5)
    place = EpochPlace(1, over=True)
    place.load_state_dict(saved.state_dict())
    assert place == saved
    torn = {name: value for name, value in EpochPlace().state_dict().items() if name != "loss_sum"}
    with pytest.raises(KeyError, match="loss_sum"):
        place.load_state_dict(torn)
    assert place == saved


def test_batches_left_out_are_known_by_epoch_and_place() -> None:
    """The same place of another epoch is another batch."""
    left_out = LeftOut({(2, 5)})
    assert left_out.holds(2, 5)
    assert not left_out.holds(5, 2)
    assert not left_out.holds(3, 5)


def test_equal_sets_are_saved_alike_and_come_back() -> None:
    """In order, whatever the set's own order is, as lists that JSON has."""
    left_out = LeftOut({(2, 5), (1, 9), (2, 1)})
    state = left_out.state_dict()
    assert state == {"batches": [[1, 9], [2, 1], [2, 5]]}
    again = LeftOut({(7, 7)})
    again.load_state_dict(state)
    assert again == left_out


@pytest.mark.parametrize("state", [{}, {"batches": [[1]]}, {"batches": 3}, {"batches": [["a", "b"]]}])
def test_what_is_no_list_of_batches_is_refused(state: dict[str, object]) -> None:
    """What was left out before still is."""
    left_out = LeftOut({(2, 5)})
    with pytest.raises((KeyError, TypeError, ValueError)):
        left_out.load_state_dict(state)  # type: ignore[arg-type] # on purpose
    assert left_out.holds(2, 5)
