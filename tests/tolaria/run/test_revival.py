from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL
from support.lanes import FakeLane, small_image
from tolaria.checkpoint.store import CheckpointStore, LoadedCheckpoint
from tolaria.config import HealthSettings, RollbackSettings
from tolaria.errors import LaneFailedError, LaneLostError, NoCheckpointError
from tolaria.images import SnapshotInfo
from tolaria.journal.rows import CheckpointRow
from tolaria.lane.messages import CaptureImage, Hold, LaneLost, LaneReady, LaneRestarted
from tolaria.run.data_skips import DataSkips
from tolaria.run.health import Health
from tolaria.run.lane_client import LaneClient
from tolaria.run.observers import RunObserver
from tolaria.run.restore_points import RestorePoint, RestorePoints
from tolaria.run.revival import Revival
from tolaria.run.status import RunStatus
from tolaria.values.training import BatchRange, EpochProgress, Position

pytestmark = pytest.mark.anyio


class Points(RestorePoints):
    """The points that the test says."""

    given: Sequence[RestorePoint] = ()

    def of(self, snapshots: Iterable[SnapshotInfo], rows: Iterable[CheckpointRow]) -> list[RestorePoint]:
        """Returns them."""
        del snapshots, rows
        return list(self.given)


class Store(CheckpointStore):
    """Loads any checkpoint but those that are damaged."""

    def __init__(self) -> None:
        self.damaged: set[str] = set()
        self.loaded: list[str] = []

    def kept_points(self) -> tuple[CheckpointRow, ...]:
        """Returns none: the points know them."""
        return ()

    def load_first(self, rows: Sequence[CheckpointRow], expired: object = None) -> LoadedCheckpoint:
        """Returns the first one that is not damaged."""
        del expired
        for row in rows:
            if row.checkpoint_id not in self.damaged:
                self.loaded.append(row.checkpoint_id)
                return LoadedCheckpoint(row, small_image(row.global_step), ())
        raise NoCheckpointError("all are damaged")


def snapshot(step: int, *, proven: bool = True, suspect: bool = False) -> RestorePoint:
    """A snapshot in memory."""
    return RestorePoint(ROLLBACK_TIER_FAST, step, 1, step, 8, f"digest-{step}", 1, suspect, proven)


def checkpoint(step: int, *, proven: bool = True, suspect: bool = False, superseded: bool = False) -> RestorePoint:
    """A checkpoint on disk."""
    row = CheckpointRow(f"c{step}", step, "run", step, 1, 8, "d", None, "superseded" if superseded else "committed")
    return RestorePoint(ROLLBACK_TIER_FULL, step, 1, step, 8, "d", 1, suspect, proven, row)


@dataclass
class Parts:
    """A revival and what it uses."""

    points: Points = field(default_factory=Points)
    store: Store = field(default_factory=Store)
    health: Health = field(default_factory=lambda: Health(RollbackSettings(), HealthSettings(), ""))
    lane: FakeLane = field(default_factory=FakeLane)

    def __post_init__(self) -> None:
        self.client = LaneClient(self.lane)
        self.status = RunStatus("run", "job", "", 10, 0.0)
        self.revival = Revival(
            self.client,
            self.status,
            self.store,
            points=self.points,
            health=self.health,
            observers=RunObserver(),
            skips=cast("DataSkips", self),
            follow=self.follow,
        )

    @property
    def ranges(self) -> tuple[BatchRange, ...]:
        """What operators have left out."""
        return (BatchRange(2, 5, 9),)

    async def follow(self, step: int, from_memory: bool) -> None:
        """Does nothing."""

    async def targets(self, *points: RestorePoint) -> tuple[tuple[str, ...], int | None]:
        """Returns the digests of snapshots that are tried, and the step of the checkpoint."""
        self.points.given = points
        plan, image = await self.revival.plan()
        assert plan.ranges == self.ranges
        return plan.targets, None if image is None else image.position.global_step


def lost(kind: str = "killed", batch: tuple[int, int] | None = None) -> LaneLost:
    """The death of a process."""
    return LaneLost(1, kind, "it was killed", batch)


async def test_the_newest_proven_point_is_first() -> None:
    """In memory: then the other sound snapshots follow. On disk: the checkpoint is loaded."""
    parts = Parts()
    found = await parts.targets(snapshot(50, proven=False), snapshot(40), snapshot(30), checkpoint(20))
    assert found == (("digest-40", "digest-30", "digest-50"), None)
    assert await parts.targets(snapshot(50, proven=False), checkpoint(20)) == ((), 20)
    assert parts.store.loaded == ["c20"]


async def test_suspect_and_superseded_points_are_last_and_never() -> None:
    """A suspect state is better than none; what was undone is not gone back to."""
    parts = Parts()
    assert await parts.targets(snapshot(50, proven=False, suspect=True), snapshot(10)) == (("digest-10",), None)
    assert await parts.targets(snapshot(50, proven=False, suspect=True)) == (("digest-50",), None)
    assert await parts.targets(checkpoint(60, superseded=True)) == ((), None)


async def test_without_points_the_run_begins_anew() -> None:
    """As it did when it began."""
    assert await Parts().targets() == ((), None)


async def test_memory_that_could_not_be_restored_is_left_for_the_disk() -> None:
    """Only if the process itself has said so; a process that was killed meanwhile says nothing about its memory."""
    parts = Parts()
    points = snapshot(40), checkpoint(20)
    parts.revival.on_lost(lost())
    assert await parts.targets(*points) == (("digest-40",), None)
    parts.revival.on_lost(lost("killed"))
    assert await parts.targets(*points) == (("digest-40",), None)
    parts.revival.on_lost(lost("raised"))
    assert await parts.targets(*points) == ((), 20)
    with pytest.raises(LaneFailedError, match="no restore point can be loaded"):
        await parts.targets(snapshot(40))


async def test_damaged_checkpoints_leave_the_memory() -> None:
    """An unproven snapshot is better than a checkpoint that cannot be read; without one the run fails."""
    parts = Parts()
    parts.store.damaged = {"c20"}
    assert await parts.targets(snapshot(50, proven=False), checkpoint(20)) == (("digest-50",), None)
    with pytest.raises(LaneFailedError):
        await parts.targets(checkpoint(20))


@pytest.mark.parametrize("kind", ["crashed", "exited", "raised", "out_of_memory", "silent", "connection"])
async def test_a_batch_with_which_two_processes_died_is_left_out(kind: str) -> None:
    """One death is an accident; deaths with other batches in between, or of other kinds, are too."""
    parts = Parts()
    deaths = (kind, (1, 5)), (kind, (1, 7)), (kind, (1, 5)), ("killed", (1, 5)), (kind, (1, 5))
    for each, batch in deaths:
        parts.revival.on_lost(lost(each, batch))
    assert not parts.health.left_out
    parts.revival.on_lost(lost(kind, None))  # it did not come as far as to a batch
    parts.revival.on_lost(lost(kind, (1, 5)))
    assert parts.health.left_out == ((1, 5),)


async def test_processes_that_are_killed_from_outside_may_meet_the_same_batch_twice() -> None:
    """By chance; the third time in a row is none any more, such as where kills for lack of memory are not counted."""
    parts = Parts()
    parts.revival.on_lost(lost(batch=(1, 5)))
    parts.revival.on_lost(lost(batch=(1, 5)))
    assert not parts.health.left_out
    parts.revival.on_lost(lost(batch=(1, 5)))
    assert parts.health.left_out == ((1, 5),)


async def test_what_waits_for_a_dead_process_is_answered_and_holds_are_renewed() -> None:
    """Commands get an error, and the next process is held if any holder wants it held."""
    parts = Parts()
    parts.lane.holds = False
    parts.client.start(lambda _events: None)
    parts.client.hold("operator")
    waiting = parts.client.submit(CaptureImage())
    parts.revival.on_lost(lost())
    with pytest.raises(LaneLostError):
        await waiting
    with pytest.raises(LaneLostError):
        await parts.client.reach_boundary()
    assert "has died" in parts.status.recovering
    restored = parts.revival.on_restarted(LaneRestarted(2, ready(30)))
    assert (restored.position, parts.status.recovering, parts.client.lost) == (Position(30, 1), "", "")
    assert [command for command in parts.lane.sent if isinstance(command, Hold)] == [Hold(1), Hold(2)]


def ready(step: int) -> LaneReady:
    """What a lane has built, and restored, at a step."""
    return LaneReady(Position(step, 1), EpochProgress(1), 10, "cpu", "2", {}, (), (), {"host": 0.1}, (), ())


async def test_a_replica_is_looked_for_once_memory_has_failed() -> None:
    """Only then: before the checkpoints are looked at, so that it is one of them."""
    parts, adopted = Parts(), list[int]()

    async def adopt() -> None:
        adopted.append(60)
        parts.points.given = [*parts.points.given, checkpoint(60)]

    parts.revival.adopt_replica = adopt
    parts.revival.on_lost(lost())
    assert await parts.targets(snapshot(70), checkpoint(50)) == (("digest-70",), None)
    assert adopted == []
    parts.revival.on_lost(lost("raised"))
    assert await parts.targets(snapshot(70), checkpoint(50)) == ((), 60)
    assert adopted == [60]
