"""The event loop's end of the lane: what is asked of it, how it is made to stand, and its reports as they come.

Owns the lane and the box in which reports cross. Must not know what reports mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tolaria.images.image import SnapshotInfo, SnapshotStatistics
from tolaria.training.fence_desk import FenceDesk
from tolaria.training.lane import Hearts, Lane
from tolaria.training.profiling import LaneProfiler
from tolaria.training.recovery.keeper import SnapshotKeeper
from tolaria.training.reports import Report, ReportBox
from tolaria.training.rig import Rig
from tolaria.training.standstill import Standstill

Take = Callable[[Sequence[Report]], None]


class LaneLink:
    """Used on the event loop only.

    Args:
        rig: built already; from `start` on the lane's.
        keeper: of the rig's states.
        threads: CPU threads of torch.
        hearts: where the lane shows that it gets on.
        profiler: of its steps.
    """

    def __init__(
        self, rig: Rig, keeper: SnapshotKeeper, *, threads: int, hearts: Hearts, profiler: LaneProfiler
    ) -> None:
        self.rig = rig
        self._keeper = keeper
        self._box = ReportBox(self._notify)
        self._lane = Lane(rig, self._box, keeper=keeper, threads=threads, hearts=hearts, profiler=profiler)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._take: Take = lambda _reports: None
        self._order = 0
        self.desk = FenceDesk(self._lane.post)
        self.standstill = Standstill(self._lane.hold, self._lane.release)

    @property
    def order(self) -> int:
        """Number of the last order for an epoch; 0 before the first."""
        return self._order

    def start(self, take: Take) -> None:
        """Start the lane; `take` gets its reports, frame by frame."""
        self._loop, self._take = asyncio.get_running_loop(), take
        self._lane.start()

    def run_epoch(self) -> None:
        """Have the lane run on: the rest of the epoch that it is in the midst of, or else the next."""
        self._order += 1
        self._lane.run_epoch(self._order)

    def points(self) -> tuple[SnapshotInfo, ...]:
        """The snapshots that can be restored, oldest first."""
        return self._keeper.points()

    def snapshots(self) -> SnapshotStatistics:
        """How snapshots have gone."""
        return self._keeper.statistics()

    def stop(self) -> None:
        """Have the lane finish its step and end."""
        self._lane.stop()

    def close(self, timeout_s: float) -> bool:
        """Make sure that the lane's thread ends; whether it did. Blocks, but for a moment."""
        self._lane.stop()
        self._box.close()
        return self._lane.join(timeout_s)

    def _notify(self) -> None:
        """Called from the lane's thread: let the event loop take the box's reports."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        if reports := self._box.take():
            self._take(reports)
