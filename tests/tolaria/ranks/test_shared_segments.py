"""Images in memory of the leader's that the other ranks map: each copies its parts there, and restores them."""

from __future__ import annotations

from typing import Any, Final

import pytest

from support.rank_run import run_on_ranks
from tolaria.ranks.group import Group

NONE_OF_ITS_OWN: Final[list[list[bool]]] = [[], []]
SCENARIOS: Final = "support.segment_scenarios"


def on_two_ranks(name: str, **options: Any) -> list[Any]:
    """Returns what each rank says of a scenario."""
    return list(run_on_ranks(2, [(f"{SCENARIOS}:{name}", options)])[0])


@pytest.mark.parametrize(
    ("parallel", "full"),
    [pytest.param("fsdp", False, marks=pytest.mark.slow), ("fsdp", True), ("ddp", False)],
)
def test_nothing_is_gathered_or_sent_on_one_machine(parallel: str, full: bool) -> None:
    """Every rank restores and proves its parts; the digests are those with which the leader gathers and sends.

    In full: from an image that the service has read from a checkpoint.
    """
    shown, sent = (on_two_ranks("go_back", parallel=parallel, shows=shows, full=full) for shows in (True, False))
    for rank in shown:
        assert rank["restored"] == [shown[0]["captured"]] * 2, rank
        assert rank["calls"] == {"gathered": 0, "sent": 0}
        assert rank["same"]
        assert rank["held"] == []
    assert [rank["restored"] for rank in sent] == [[sent[0]["captured"]] * 2] * 2
    assert sent[0]["captured"] == shown[0]["captured"]
    assert all(rank["same"] for rank in sent)
    assert sent[0]["calls"]["sent"] > 0
    assert (sent[0]["calls"]["gathered"] > 0) == (parallel == "fsdp")


def test_the_state_is_gathered_and_sent_where_a_rank_cannot_map_it() -> None:
    """As without memory for it; captures and restores are the same."""
    ranks = on_two_ranks("without_room")
    for rank in ranks:
        assert rank["restored"] == [ranks[0]["captured"]] * 2, rank
        assert rank["same"]
        assert min(rank["calls"].values()) > 0


def test_no_rank_keeps_memory_that_the_leader_has_given_up() -> None:
    """It would not be freed for as long as one maps it."""
    leader, other = on_two_ranks("held_memory")
    assert leader == [[], [], []]
    first, second, beside = other
    assert len(first) == len(second) == 1
    assert first != second
    assert beside == []


def test_memory_of_a_ring_that_has_become_too_small_is_unmapped() -> None:
    """Nothing is allocated then, which would be the occasion otherwise."""
    _, (before, after) = on_two_ranks("held_after_growth")
    assert len(before) == 1
    assert after == []


@pytest.mark.parametrize("start", [False, True])
def test_a_part_that_differs_from_the_image_is_found(start: bool) -> None:
    """By the rank that has it, without a gather: all learn of it, also when a group starts."""
    leader, other = on_two_ranks("altered", start=start)
    assert leader == ([[True], [False]] if start else [True, False])
    assert other == (NONE_OF_ITS_OWN if start else [True, False])


def test_ranks_on_several_machines_share_no_memory() -> None:
    """There the leader gathers and sends."""
    group = Group(0, 2, 0, 1)
    group.connect_segments()
    assert group.segments is None
