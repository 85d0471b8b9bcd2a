"""Which restore point a rollback takes, and when points are proven or suspect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, ROLLBACK_TIER_UNSPECIFIED
from tolaria.images import SnapshotInfo
from tolaria.journal.rows import CheckpointRow
from tolaria.rollback.protocol import Rollback
from tolaria.run.restore_points import RestorePoint, RestorePoints, attempts_used, choose, resumed_points
from tolaria.run.restorer import nothing_for
from tolaria.values.lineage import Lineage
from tolaria.values.training import Position

ROW = CheckpointRow("c", 1, "run", 10, 1, 100, "d", None)


def row(step: int, *, attempt: int = 1, **fields: Any) -> CheckpointRow:
    """A checkpoint of this step, whose id is c and its step."""
    return replace(ROW, checkpoint_id=f"c{step}", at_ns=step, global_step=step, attempt=attempt, **fields)


def point(text: str) -> RestorePoint:
    """A point such as `s40+`: a snapshot (s) or checkpoint (c), its step; proven (+), suspect (?), superseded (x)."""
    step, marks = int("".join(filter(str.isdigit, text))), text.lstrip("sc0123456789")
    superseded = "superseded" if "x" in marks else "committed"
    checkpoint = None if text[0] == "s" else row(step, state=superseded)
    tier = ROLLBACK_TIER_FAST if checkpoint is None else ROLLBACK_TIER_FULL
    return RestorePoint(tier, step, 1, step, 1, "d", 1, "?" in marks, "+" in marks, checkpoint)


def name(point: RestorePoint) -> str:
    """The letter and step of a point."""
    return f"{'s' if point.checkpoint is None else 'c'}{point.global_step}"


AUTO, FAST, FULL = ROLLBACK_TIER_UNSPECIFIED, ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL


@pytest.mark.parametrize(
    ("points", "before", "tier", "taken"),
    [
        # The newest proven one of both tiers; memory wins a tie.
        ("s10+ s40+ c20+ c30+", 100, AUTO, "s40"),
        ("s10+ c30+ c20+", 100, AUTO, "c30"),
        ("s30+ c30+", 100, AUTO, "s30"),
        # Only from before the evidence.
        ("s10+ s40+ c20+ c30+", 40, AUTO, "c30"),
        ("s10+ s40+ c20+ c30+", 30, AUTO, "c20"),
        ("s10+ s40+ c20+ c30+", 10, AUTO, None),
        # Neither unproven nor suspect nor superseded ones.
        ("s50 s45? c30+ c40", 100, AUTO, "c30"),
        ("c40+x c20+", 100, AUTO, "c20"),
        ("s50 c40", 100, AUTO, None),
        # The start counts, if it is there.
        ("s0+ s50", 100, AUTO, "s0"),
        # A collapse asks for a checkpoint.
        ("s40+ c20+", 100, FULL, "c20"),
    ],
)
def test_the_point_of_an_automatic_rollback(points: str, before: int, tier: int, taken: str | None) -> None:
    """The newest proven one from before the evidence, over both tiers; without one there is no rollback."""
    for origin in ("health", "tamiyo"):
        rollback = Rollback(tier, None, "", origin, before_step=before)  # type: ignore[arg-type] # a tier
        choice = choose(map(point, points.split()), rollback)
        assert (None if choice is None else name(choice.point)) == taken


@pytest.mark.parametrize(
    ("origin", "points", "taken"),
    [
        ("tamiyo", "s10+ s20", "s10"),  # only a proven one
        ("tamiyo", "s10+ s30+ s40", "s10"),  # and older than the one restored before
        ("tamiyo", "s30+ s40", None),
        ("operator", "s10+ s20", "s20"),
    ],
)
def test_the_point_for_a_named_step(origin: str, points: str, taken: str | None) -> None:
    """The nearest at or before it; the rules of automatic rollbacks hold for the controller's too."""
    choice = choose(map(point, points.split()), Rollback(AUTO, 45, "", origin, before_step=30))
    assert (None if choice is None else name(choice.point)) == taken


@pytest.mark.parametrize(
    ("points", "before", "preferred", "taken"),
    [
        ("s10+ s80+ s98+", 100, 85, "s80"),
        ("s98+", 100, 85, "s98"),  # nothing is better
        ("c0+ s98+", 100, 85, "s98"),  # it would cost more than it may bring
        ("s10+ s300+", 301, 80, "s10"),  # a slow rise
        ("s10 s80? s98+", 100, 85, "s98"),
    ],
)
def test_a_point_from_before_the_rise_is_preferred(points: str, before: int, preferred: int, taken: str) -> None:
    """A proven one that is not much older; otherwise the newest proven one from before the evidence."""
    rollback = Rollback(AUTO, None, "", "health", before_step=before, preferred_before=preferred)
    choice = choose(map(point, points.split()), rollback)
    assert choice is not None
    assert name(choice.point) == taken


@pytest.mark.parametrize(
    ("points", "tier", "step", "taken", "why"),
    [
        ("s10+ s40 c20+ c30?", AUTO, None, "c20", "the newest proven one"),
        ("s10 s40 c20 c50?", AUTO, None, "s40", "none is proven, the newest not suspect"),
        ("s10? c20?", AUTO, None, None, ""),
        ("s10+ c20+", FAST, None, "s10", "the newest proven one"),
        ("s30+ c20", FULL, None, "c20", "none is proven, the newest not suspect"),
        ("s10 s40? c35", AUTO, 38, "c35", "the nearest at or before step 38"),
        ("s10 s40? c35", AUTO, 50, "s40", "the nearest at or before step 50"),
        ("s10 s40? c35", FAST, 38, "s10", "the nearest at or before step 38"),
        ("s10 c35+x c20", AUTO, 40, "c20", "the nearest at or before step 40"),
        ("s10", AUTO, 9, None, ""),
    ],
)
def test_the_point_of_an_operators_rollback(
    points: str, tier: int, step: int | None, taken: str | None, why: str
) -> None:
    """The newest proven one, else the newest not suspect, or the nearest to a step; and it says which."""
    choice = choose(map(point, points.split()), Rollback(tier, step, "", "operator"))  # type: ignore[arg-type] # a tier
    assert (None if choice is None else name(choice.point)) == taken
    assert choice is None or str(choice).startswith(f"{why}: ")


def test_a_named_checkpoint_is_taken_whatever_it_is() -> None:
    """A superseded or suspect one too; no other one replaces it when it is damaged."""
    points = [point(text) for text in ("c40+", "c30?x", "s50+")]
    choice = choose(points, Rollback(AUTO, None, "", "operator", checkpoint_id="c30"))
    assert choice is not None
    assert [found.checkpoint_id for found in choice.checkpoints] == ["c30"]
    assert choose(points, Rollback(AUTO, None, "", "operator", checkpoint_id="c31")) is None


def test_older_checkpoints_are_tried_when_one_is_damaged() -> None:
    """Newest first, and only those that the rollback may take."""
    points = [point(text) for text in ("c40+", "c30", "c20+", "c50+", "c10+")]
    choice = choose(points, Rollback(AUTO, None, "", "health", before_step=45))
    assert choice is not None
    assert [found.checkpoint_id for found in choice.checkpoints] == ["c40", "c20", "c10"]


# -- flags -----------------------------------------------------------------------------------------------------------


def snapshots(*steps: int) -> tuple[SnapshotInfo, ...]:
    """Snapshots of these steps."""
    return tuple(SnapshotInfo(Position(step, 1), 8, "d", at_ns=step) for step in steps)


def flags(points: RestorePoints, infos: tuple[SnapshotInfo, ...]) -> str:
    """The points as `point` parses them, oldest first."""
    found = reversed(points.of(infos, ()))
    return " ".join(f"{name(p)}{'+' * p.proven}{'?' * p.suspect}" for p in found)


def losses(points: RestorePoints, text: str, *, suspect: bool = False) -> list[str]:
    """Reports a loss for each letter: `.` at or below the top of the window, `^` above it."""
    return [key for letter in text for key in points.step_done(above=letter == "^", suspect=suspect)]


def test_three_sound_losses_prove_a_point() -> None:
    """Losses above the top do not count; the state before the first step needs no proof."""
    points = RestorePoints()
    points.snapshots_changed(snapshots(0))
    losses(points, ".")
    points.snapshots_changed(snapshots(0, 1))
    assert flags(points, snapshots(0, 1)) == "s0+ s1"
    losses(points, "..^^")
    assert flags(points, snapshots(0, 1)) == "s0+ s1"
    losses(points, ".")
    assert flags(points, snapshots(0, 1)) == "s0+ s1+"
    assert points.newest_proven_step == 1


def test_a_point_is_suspect_while_losses_explode_and_nothing_has_proven_it() -> None:
    """The flag is that of the moment of the capture; sound losses afterwards remove it."""
    points = RestorePoints()
    losses(points, "....^^", suspect=True)
    points.snapshots_changed(snapshots(6))
    losses(points, "..")
    points.snapshots_changed(snapshots(6, 8))
    assert flags(points, snapshots(6, 8)) == "s6? s8"
    losses(points, ".")
    assert flags(points, snapshots(6, 8)) == "s6+ s8"


def test_a_checkpoint_has_the_flags_of_its_capture() -> None:
    """Losses that are reported while it is written count, and the journal is informed once."""
    points = RestorePoints()
    losses(points, ".", suspect=True)
    mark = points.captured(1)
    assert (mark.provenance.suspect, mark.keep) == (True, "")
    losses(points, "..")
    assert points.committed(row(1)) == []
    assert losses(points, "..") == ["c1"]
    assert points.captured(5).keep == "c1"


def test_a_rollback_begins_an_attempt() -> None:
    """Points of undone steps are forgotten; what follows belongs to the new attempt."""
    points = RestorePoints()
    points.snapshots_changed(snapshots(2, 4))
    points.committed(row(4))
    losses(points, "...")
    assert points.newest_proven_step == 4
    points.rewound(2, None)
    assert points.lineage == Lineage(2, ((1, 2),))
    assert points.newest_proven_step == 2
    points.snapshots_changed(snapshots(2, 4))
    assert flags(points, snapshots(2, 4)) == "s2+ s4"
    assert [p.attempt for p in points.of(snapshots(2, 4), ())] == [2, 1]
    assert points.captured(4).keep == ""


def test_a_rollback_to_another_branch_takes_its_lineage() -> None:
    """Its ancestors are those of the checkpoint; attempt numbers are never used twice."""
    points = RestorePoints()
    points.rewound(2, None)
    points.rewound(9, row(9))
    assert points.lineage == Lineage(3, ((1, 9),))


@pytest.mark.parametrize(
    ("resumed", "rows", "rollbacks", "lineage"),
    [
        # Nothing lies beyond: the attempt goes on.
        (row(20), [row(10), row(20)], [], Lineage(1)),
        # A suspect checkpoint was passed over, or later ones were superseded or removed.
        (row(20), [row(20), row(30, suspect=1)], [], Lineage(2, ((1, 20),))),
        (row(20), [row(20), row(30, state="pruned")], [], Lineage(2, ((1, 20),))),
        # The crash came between a rollback and the next checkpoint.
        (row(20), [row(20)], [2, 3], Lineage(4, ((1, 20),))),
        (row(30, attempt=2, forks="[[1,20]]"), [row(20), row(30, attempt=2)], [2], Lineage(2, ((1, 20),))),
    ],
)
def test_the_lineage_of_a_resumed_run(
    resumed: CheckpointRow, rows: list[CheckpointRow], rollbacks: list[int], lineage: Lineage
) -> None:
    """New states are never taken for those that the run has left."""
    assert resumed_points(resumed, rows, attempts_used(rows, rollbacks)).lineage == lineage


@pytest.mark.parametrize(("fields", "shown"), [({"proven": 1}, "s20+"), ({}, "s20"), ({"suspect": 1}, "s20?")])
def test_a_resumed_run_knows_its_state(fields: dict[str, Any], shown: str) -> None:
    """The first snapshot is of the state of the checkpoint, and has its flags."""
    points = RestorePoints(resumed=row(20, **fields))
    points.snapshots_changed(snapshots(20))
    assert flags(points, snapshots(20)) == shown
    assert losses(points, "...") == ([] if "proven" in fields else ["c20"])
    assert flags(points, snapshots(20)) == "s20+"


def test_the_checkpoint_of_the_state_that_is_left_is_no_target() -> None:
    """Not even for a second try, which would restore what the operator wants to leave."""
    rollback = Rollback(AUTO, 100, "", "operator")
    rollback.made_checkpoint_id = "c50"
    choice = choose(map(point, ("c30+", "c50")), rollback)
    assert choice is not None
    assert (name(choice.point), [row.checkpoint_id for row in choice.checkpoints]) == ("c30", ["c30"])


@pytest.mark.parametrize(
    ("points", "step", "words"),
    [
        ("s50 c20x+ c10x", 30, "the oldest of all is of step 50; a superseded one is of step 20: checkpoint c20"),
        ("s50 c40x", 30, "the oldest of all is of step 50"),
        ("c30x", 30, "at or before step 30; a superseded one is of step 30: checkpoint c30"),
    ],
)
def test_who_finds_no_point_learns_which_superseded_one_there_is(points: str, step: int, words: str) -> None:
    """With the id by which an operator can go back to it."""
    rollback = Rollback(AUTO, step, "odd", "operator")
    assert nothing_for(rollback, [point(each) for each in points.split()]).endswith(words)
