"""What follows the death of the lane's process: the next one goes on from the newest sound state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import structlog

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FULL, ROLLBACK_TIER_UNSPECIFIED
from tolaria.errors import LaneFailedError, LaneLostError, RestoreUnprovenError, TolariaError
from tolaria.lane import messages
from tolaria.rollback.protocol import EMERGENCY, Rollback
from tolaria.run.health import Health
from tolaria.run.lane_client import LaneClient
from tolaria.run.observers import RunObserver
from tolaria.run.restorer import LaneRestorer
from tolaria.run.status import RunStatus

_log = structlog.get_logger(__name__)


class Revival:
    """Notes that the lane's process has died, and has the next one restore a state. Used on the event loop only."""

    def __init__(
        self, lane: LaneClient, status: RunStatus, restorer: LaneRestorer, health: Health, observers: RunObserver
    ) -> None:
        self._lane = lane
        self._status = status
        self._restorer = restorer
        self._health = health
        self._observers = observers
        self._restarted: messages.LaneRestarted | None = None
        self._lost_at_s = math.nan
        self._batch: tuple[int, int] | None = None
        """The batch that was in flight at the last death."""

    def on_lost(self, event: messages.LaneLost) -> None:
        """Handles the death of a process."""
        if not self._status.recovering:
            self._lost_at_s = time.monotonic()
        self._restarted = None
        if event.batch is not None and event.batch == self._batch:
            self._health.leave_out(event.batch)
            _log.error("batch_left_out", epoch_and_place=event.batch, detail="two processes in a row died with it")
        self._batch = event.batch
        self._lane.mark_lost(event)
        self._status.recovering = f"the lane's process {event.generation} has died: {event.cause}"
        self._observers.on_lane_lost(event, self._status.global_step)

    def on_restarted(self, event: messages.LaneRestarted) -> None:
        """Handles a new process, which has built the job."""
        self._restarted = event
        self._lane.mark_restarted()
        self._status.feed.changed()

    async def restarted(self) -> messages.LaneRestarted | None:
        """Waits for the next process; returns None if the lane has ended instead."""
        await self._status.feed.until(lambda: self._restarted is not None or self._lane.ended is not None)
        return self._restarted

    async def restore(self, restarted: messages.LaneRestarted, rewind: Callable[[messages.Restored], None]) -> None:
        """Has the new process restore the newest sound state; without any, the run begins anew.

        `rewind` is called in the latter case. Returns early if this process has died too. Raises LaneFailedError if
        there are restore points, but none can be restored.
        """
        try:
            # Answered after the snapshots in memory that the process has taken over are known.
            await self._lane.call(messages.SkipBatches(self._health.left_out))
            if not await self._restore_newest():
                rewind(_as_built(restarted.ready))
        except LaneLostError:
            return
        duration_s = time.monotonic() - self._lost_at_s
        self._status.recovering = ""
        self._observers.on_lane_recovered(restarted.generation, self._status.global_step, duration_s)
        self._status.feed.changed()

    async def _restore_newest(self) -> bool:
        """Returns False if there is no restore point."""
        failure: TolariaError | None = None
        for tier in (ROLLBACK_TIER_UNSPECIFIED, ROLLBACK_TIER_FULL):
            for target_step in (None, self._status.global_step):  # the nearest one, if all are suspect
                rollback = Rollback(tier, target_step, self._status.recovering, EMERGENCY)
                rollback.deadline_s = math.inf
                try:
                    await self._restorer.choose(rollback)
                    await self._restorer.restore(rollback, decided=self._status.adjustments)
                except LaneLostError:
                    raise
                except TolariaError as error:
                    failure = failure or (None if rollback.chosen_step is None else error)
                    continue
                if not rollback.proven:
                    failure = failure or RestoreUnprovenError(rollback.restored_step)
                    continue
                _log.warning("lane_restored", step=rollback.restored_step, point=rollback.chosen)
                return True
        if failure is not None:
            raise LaneFailedError(f"{self._status.recovering}; no state can be restored: {failure}")
        return False


def _as_built(ready: messages.LaneReady) -> messages.Restored:
    """Returns the state in which a lane is built, as if it had been restored."""
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
