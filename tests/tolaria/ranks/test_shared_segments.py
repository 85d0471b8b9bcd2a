"""Images in memory of the leader's that the other ranks map: each copies its parts there, and restores them thence."""

from __future__ import annotations

from typing import Any, Final

import pytest

from support.rank_run import run_on_ranks
from tolaria.ranks.group import Group
from tolaria.ranks.shared_segments import SharedSegments

SCENARIOS: Final = "support.segment_scenarios"


def on_two_ranks(name: str, **options: Any) -> list[Any]:
    """Returns what each rank says of a scenario."""
    return list(run_on_ranks(2, [(f"{SCENARIOS}:{name}", options)])[0])


@pytest.mark.parametrize(("parallel", "full"), [("fsdp", False), ("fsdp", True), ("ddp", False)])
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


def test_a_rank_without_room_to_map_refuses_and_changes_nothing() -> None:
    """Neither a capture nor a restore is done in part; with room, both are done."""
    leader, other = on_two_ranks("without_room")
    (reason, refused), (_, damaged) = leader["refused"], other["refused"]
    assert "rank 1 has no room to map the leader's memory" in reason
    assert (refused, damaged) == (["RestoreAbandonedError"], ["ImageDamagedError"])
    assert leader["unchanged"]
    assert other["unchanged"]
    assert leader["again"] == other["again"] == [leader["good"]] * 2


def test_no_rank_keeps_memory_that_the_leader_has_given_up() -> None:
    """It would not be freed for as long as one maps it."""
    leader, other = on_two_ranks("held_memory")
    assert leader == [[], [], []]
    first, second, beside = other
    assert len(first) == len(second) == 1
    assert first != second
    assert beside == []


def test_a_part_that_differs_from_the_image_is_found() -> None:
    """By the rank that has it, without a gather: the other one proves its own."""
    assert on_two_ranks("altered") == [[True, True], [True, False]]


def test_ranks_on_several_machines_share_no_memory() -> None:
    """There the leader gathers and sends."""
    assert SharedSegments.connect(Group(0, 2, 0, 1)) is None
