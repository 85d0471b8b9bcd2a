"""What exists before a run: its settings, storage, board and telemetry, and the lane, built or not."""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from tolaria.checkpoint.storage import Storage
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import Settings
from tolaria.emergency.supervision import Heartbeats
from tolaria.images import StateImage
from tolaria.journal.rows import EmergencyRow, RunRow
from tolaria.lane.messages import LaneReady
from tolaria.run.data_skips import DataSkip
from tolaria.run.lane_client import LaneHandle
from tolaria.run.restore_points import RestorePoints
from tolaria.signals import SignalBoard
from tolaria.status_page.curves import CurveSet
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.logging import LogContext
from tolaria.telemetry.metrics import Metrics
from tolaria.values.lineage import BranchOrigin
from tolaria.values.optimization import ActiveAdjustment


class LaneBuild(Protocol):
    """A lane that has been built but not started; `tolaria.lane.build` documents it."""

    @property
    def ready(self) -> LaneReady:
        """What has been built."""

    def name_run(self, run_id: str) -> None:
        """Says to the job to which run it belongs."""

    def begin_run(self) -> None:
        """Gives the model of a new run its first values, if the settings name them."""

    def resume_run(self, image: StateImage, decided: Sequence[ActiveAdjustment]) -> None:
        """Restores a checkpoint of an earlier process, with the adjustments of the run in `decided`."""

    def lane(self, heartbeat: Heartbeats, traces_dir: Path) -> LaneHandle:
        """Returns the lane."""


def build_lane(settings: Settings) -> LaneBuild:
    """Builds the job and the lane around it; imports torch. Raises as `tolaria.lane.build.build` does."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        # Imported by name, so that torch is not loaded earlier and is absent from the package's import graph.
        return cast("LaneBuild", importlib.import_module("tolaria.lane.build").build(settings))
    finally:
        # A DataLoader installs a handler that raises the failure of a worker wherever the main thread is at that time.
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGCHLD, before)


@dataclass(frozen=True, slots=True)
class Foundation:
    """What exists before the run. `run` is the run's row; `active_halt` is the halt it was resumed with.

    `open_emergencies` are all that were not cleared, that halt included; `newest_checkpoint_ns` is the Unix time of
    the checkpoint that was resumed. `build` is that of a lane in this process; otherwise the lane's own process builds
    it, resumes it from `checkpoint`, an image and the run's adjustments, and `on_ready` is called then.
    `points` are the restore points that earlier processes of the run have left, `rollbacks` their number of rollbacks
    by origin, `skips` the data that operators have had them leave out, `branch` where the run has branched off.
    `curves` are those of earlier processes of the run. `reread` reads the sources of the settings again.
    """

    settings: Settings
    build: LaneBuild | None
    board: SignalBoard
    storage: Storage
    writer: CheckpointWriter
    run: RunRow
    active_halt: EmergencyRow | None
    metrics: Metrics
    emitter: Emitter
    log_context: LogContext
    open_emergencies: tuple[EmergencyRow, ...] = ()
    newest_checkpoint_ns: int | None = None
    checkpoint: tuple[StateImage, tuple[ActiveAdjustment, ...]] | None = None
    on_ready: Callable[[LaneReady], object] = lambda _ready: None
    points: RestorePoints = field(default_factory=RestorePoints)
    rollbacks: Mapping[str, int] = field(default_factory=dict)
    skips: tuple[DataSkip, ...] = ()
    branch: BranchOrigin | None = None
    curves: CurveSet = field(default_factory=CurveSet)
    reread: Callable[[], Settings] = Settings
