"""What follows the death of the lane's process: the next one goes on from the newest sound state."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

import anyio
import anyio.lowlevel
import anyio.to_thread
import structlog

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from tolaria.checkpoint.store import CheckpointStore
from tolaria.errors import LaneFailedError, NoCheckpointError, WrongStateError
from tolaria.images import StateImage
from tolaria.lane import messages
from tolaria.lane.order import RestorePlan
from tolaria.ranks.replicas import LiveSnapshots
from tolaria.run.data_skips import DataSkips
from tolaria.run.health import Health
from tolaria.run.lane_client import LaneClient
from tolaria.run.observers import RunObserver
from tolaria.run.replicas import live_snapshots
from tolaria.run.restore_points import RestorePoint, RestorePoints
from tolaria.run.status import RunStatus

_log = structlog.get_logger(__name__)

_DEATHS_OF_A_BATCH: Final = {"killed": 3, "node_lost": math.inf, "regrouped": math.inf}
"""Deaths in a row after which a batch is taken for their cause, by kind; two of other kinds.

What kills from outside, such as a machine that is drained, may by chance meet the same batch twice; no batch makes a
machine go or come.
"""


class Revival:
    """Decides what the next process of the lane goes on from. Used on the event loop only.

    The process restores that state before it takes commands: there is no moment at which another state could be
    trained or saved. `follow` is called with the step of each restored state, and whether it was in memory.
    """

    def __init__(
        self,
        lane: LaneClient,
        status: RunStatus,
        store: CheckpointStore,
        *,
        points: RestorePoints,
        health: Health,
        observers: RunObserver,
        skips: DataSkips,
        follow: Callable[[int, bool], Awaitable[None]],
    ) -> None:
        self._lane = lane
        self._status = status
        self._store = store
        self._points = points
        self._follow = follow
        self._health = health
        self._skips = skips
        self._observers = observers
        self._lost_at_s = math.nan
        self._deaths: list[tuple[str, tuple[int, int]]] = []
        """Kinds and batches of the last deaths in a row that were alike."""
        self._from_memory = False
        self._memory_failed = False
        self._revived = anyio.Event()
        self.adopt_replica: Callable[[], Awaitable[object]] = anyio.lowlevel.checkpoint
        """Makes a newer replica, if there is one, a checkpoint; called if snapshots in memory cannot be restored."""

    def live_snapshots(self) -> LiveSnapshots:
        """Returns the snapshots in memory that replicas are made of."""
        points = self._points.of(self._status.snapshots, ())
        return live_snapshots(self._status.run_id, points, self._points.lineage)

    def on_lost(self, event: messages.LaneLost) -> None:
        """Handles the death of a process."""
        if self._status.recovering:  # it had not restored a state yet
            self._memory_failed = self._memory_failed or (self._from_memory and event.kind == "raised")
        else:
            self._lost_at_s = time.monotonic()
        self._suspect(event)
        self._lane.mark_lost(event)
        self._status.recovering = f"the lane's process {event.generation} has died: {event.cause}"
        self._observers.on_lane_lost(event, self._status.global_step)

    def _suspect(self, event: messages.LaneLost) -> None:
        """Leaves a batch out with which processes in a row have died in the same way."""
        if event.batch is None:
            return
        death = (event.kind, event.batch)
        self._deaths = [*(each for each in self._deaths if each == death), death]
        if len(self._deaths) == _DEATHS_OF_A_BATCH.get(event.kind, 2):
            self._health.leave_out(event.batch)
            detail = f"{len(self._deaths)} processes in a row died with it: {event.cause}"
            _log.error("batch_left_out", epoch_and_place=event.batch, detail=detail)

    async def plan(self) -> tuple[RestorePlan, StateImage | None]:
        """Returns what the next process is to restore, with the checkpoint if it is one.

        Raises LaneFailedError if there are restore points, but none can be loaded; the run must not begin anew then.
        """
        if self._memory_failed:
            await self.adopt_replica()
        rows = await anyio.to_thread.run_sync(self._store.kept_points, abandon_on_cancel=True)
        points = self._points.of(self._status.snapshots, rows)
        ordered = best_first(point for point in points if not point.superseded)
        memory = [point for point in ordered if point.tier == ROLLBACK_TIER_FAST and point.digest]
        usable = bool(memory) and not self._memory_failed
        image = None
        if ordered and not (usable and memory[0] is ordered[0]):
            image = await self._checkpoint(ordered)
        self._from_memory = usable and image is None
        if ordered and image is None and not usable:
            raise LaneFailedError(f"{self._status.recovering}; no restore point can be loaded")
        tried = memory if self._from_memory else ()
        targets = tuple(point.digest for point in tried if point.suspect <= memory[0].suspect)
        return RestorePlan(targets, self._health.left_out, self._status.adjustments, self._skips.ranges), image

    def on_restarted(self, event: messages.LaneRestarted) -> messages.Restored:
        """Handles a new process; returns the state that it has restored."""
        self._status.recovering, self._memory_failed = "", False
        self._lane.mark_restarted()
        self._revived.set()
        ready, duration_s = event.ready, time.monotonic() - self._lost_at_s
        self._status.ranks = ready.ranks
        _log.warning("lane_restored", step=ready.position.global_step, from_memory=self._from_memory)
        self._observers.on_lane_recovered(event.generation, ready.position.global_step, duration_s)
        return messages.Restored(
            position=ready.position,
            state_digest="",
            expected_digest="",
            restore_ms=0.0,
            progress=ready.progress,
            seeds=ready.seeds,
            learning_rates=ready.learning_rates,
            adjustments=ready.adjustments,
            losses=ready.losses,
        )

    async def serve(self) -> None:
        """Does what follows each restored state, until cancelled: as after a rollback, which it may begin again."""
        while True:
            await self._revived.wait()
            self._revived = anyio.Event()
            try:
                await self._follow(self._status.global_step, self._from_memory)
            except WrongStateError as error:  # the run has ended meanwhile
                _log.info("rollback_not_repeated", detail=str(error))

    async def _checkpoint(self, ordered: Sequence[RestorePoint]) -> StateImage | None:
        rows = tuple(point.checkpoint for point in ordered if point.checkpoint is not None)
        if not rows:
            return None
        try:
            loaded = await anyio.to_thread.run_sync(self._store.load_first, rows, abandon_on_cancel=True)
        except NoCheckpointError as error:
            _log.error("checkpoints_not_loaded", detail=str(error))
            return None
        return loaded.image


def best_first(points: Iterable[RestorePoint]) -> list[RestorePoint]:
    """Returns points as they are tried: proven ones, then others, suspect ones last; the newest first among equals."""
    return sorted(points, key=lambda point: (point.proven, not point.suspect, point.age_key), reverse=True)
