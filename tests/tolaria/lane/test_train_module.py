from __future__ import annotations

import pytest

from support.lane_driver import built
from tolaria.lane.skipped_batches import SkippedBatches
from tolaria.values.training import Position


def test_equal_sets_of_skipped_batches_are_saved_alike_and_restored() -> None:
    """The JSON lists are sorted, whatever the order of the set is."""
    skipped = SkippedBatches({(2, 5), (1, 9), (2, 1)})
    state = skipped.state_dict()
    assert state == {"batches": [[1, 9], [2, 1], [2, 5]]}
    restored = SkippedBatches({(7, 7)})
    restored.load_state_dict(state)
    assert restored == skipped


@pytest.mark.parametrize("state", [{}, {"batches": [[1]]}, {"batches": 3}, {"batches": [["a", "b"]]}])
def test_a_malformed_list_of_skipped_batches_is_rejected(state: dict[str, object]) -> None:
    """The set is unchanged."""
    skipped = SkippedBatches({(2, 5)})
    with pytest.raises((KeyError, TypeError, ValueError)):
        skipped.load_state_dict(state)  # type: ignore[arg-type] # on purpose
    assert skipped.batches == {(2, 5)}


def test_skipped_batches_are_passed_over_by_epoch_and_place() -> None:
    """The same place in another epoch is another batch; passed over batches count as read."""
    module = built().module
    module.skipped.batches = {(1, 0), (2, 5)}
    module.begin_epoch()
    first = 0
    while module.next_batch() is not None:
        first += 1
    assert (first, module.progress.batches) == (7, 8)


def test_an_epoch_begins_once() -> None:
    """Within an epoch `begin_epoch` leaves progress and cursor alone; after its end it starts the next one."""
    module = built().module
    module.begin_epoch()
    assert module.position == Position(0, 1)
    module.next_batch()
    module.begin_epoch()
    assert (module.progress.number, module.progress.batches) == (1, 1)
    module.progress = module.progress.ended()
    module.begin_epoch()
    assert (module.progress.number, module.progress.batches) == (2, 0)
    assert module.cursor.state_dict()["epoch"] == 2


def test_steps_per_epoch_include_the_last_short_one() -> None:
    """8 batches in steps of 3 microbatches are 3 steps."""
    assert built(accumulate=3).module.steps_per_epoch == 3
