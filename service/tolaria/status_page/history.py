"""What the status page remembers of a run: its curves, where it went back, and its seeds. Bounded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from leyline.v1.seeds_pb2 import SeedState
from tolaria.emergency import Report
from tolaria.journal.rows import CheckpointRow
from tolaria.lane.messages import EpochDone, LaneLost, LaneReady, Restored, StepDone
from tolaria.rollback.protocol import Ending, Rollback
from tolaria.run.observers import RunObserver
from tolaria.run.restore_points import RestorePoints
from tolaria.run.status import RunStatus
from tolaria.status_page.curves import CurveSet
from tolaria.status_page.seed_timeline import SeedTimeline
from tolaria.values.lineage import Lineage

MARKS_MAX: Final = 64
_GENERAL: Final = frozenset({"loss", "accuracy"})


@dataclass(frozen=True, slots=True)
class Mark:
    """A place where the run went back: from a step to an earlier or the same one, when and why.

    `kind` is rollback or lane.
    """

    kind: str
    left_step: int
    restored_step: int
    at_ns: int
    reason: str


class PageHistory(RunObserver):
    """Remembers what has happened since this process began. Used on the event loop only.

    Attributes:
        curves: of this process, and of `earlier` ones of the run.
        marks: where the run went back, oldest first.
        journalled: rises when journal or restore points may have other rows than before.
    """

    def __init__(
        self,
        status: RunStatus,
        points: RestorePoints,
        *,
        earlier: CurveSet | None = None,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._status = status
        self._points = points
        self._wall_ns = wall_ns
        self.curves = CurveSet() if earlier is None else earlier
        self.marks: deque[Mark] = deque(maxlen=MARKS_MAX)
        self.seeds = SeedTimeline()
        self.device = ""
        self.first_step = 0
        self.journalled = 0
        self._step = 0
        self._cause = ("rollback", "")
        """Why the run went back, or is about to."""
        self._before: Lineage | None = None
        """The lineage that was left; None once it has been compared with that of the restored state."""

    # -- training ----------------------------------------------------------------------------------------------------

    def on_ready(self, ready: LaneReady) -> None:
        self.device, self._step = ready.device, ready.position.global_step
        self.curves.rewind(self._step)
        first_step = self.curves.first_step
        self.first_step = self._step if first_step is None else max(0, first_step - 1)
        self.journalled += 1

    def on_step(self, step: StepDone) -> None:
        if self._before is not None:
            self._leave_other_branch(self._before)
        self._step = step.global_step
        if not step.skipped:
            self.curves["loss"].add(step.global_step, step.loss)
        if step.logged:
            self._add_all("step", step.logged, step.global_step)

    def on_frame(self, status: RunStatus) -> None:
        self.seeds.advance(status.global_step)

    def on_epoch(self, epoch: EpochDone, *, show_layers: bool) -> None:
        del show_layers
        figures, step = epoch.evaluation.figures(), epoch.global_step
        for curve, name in (("validation_loss", "loss"), ("accuracy", "accuracy")):
            if name in figures:
                self.curves[curve].add(step, figures[name])
        self._add_all("evaluation", {name: value for name, value in figures.items() if name not in _GENERAL}, step)

    def on_boundary(self, status: RunStatus, epoch: EpochDone, *, budget_ms: float, breach: bool) -> None:
        del budget_ms, breach
        self.curves["boundary_ms"].add(epoch.global_step, status.boundaries_ms[-1])

    def on_learning_rates(self, rates: dict[str, float]) -> None:
        self._add_all("rate", rates, self._status.global_step)

    def on_seeds(self, states: Sequence[SeedState]) -> None:
        self.seeds.update(states, self._status.global_step)

    def _add_all(self, kind: str, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.curves.add(f"{kind}/{name}", step, value)

    # -- going back --------------------------------------------------------------------------------------------------

    def on_rollback_started(self, rollback: Rollback) -> None:
        self._cause = ("rollback", f"{rollback.origin}: {rollback.reason}" if rollback.reason else rollback.origin)

    def on_rollback_ended(self, rollback: Rollback) -> None:
        self.journalled += 1
        if self._before is not None and rollback.ending is Ending.RESTORED:
            self._leave_other_branch(self._before)

    def on_lane_lost(self, lost: LaneLost, step: int) -> None:
        del step
        self.journalled += 1
        self._cause = ("lane", f"{lost.kind}: {lost.cause}")

    def on_rewind(self, restored: Restored) -> None:
        step = restored.position.global_step
        self._before = self._points.lineage
        self.marks.append(Mark(self._cause[0], self._step, step, self._wall_ns(), self._cause[1]))
        self._step = step
        self._rewind(step)
        self.journalled += 1

    def _leave_other_branch(self, before: Lineage) -> None:
        """Removes the steps that the restored state did not pass: it may be of an attempt that had been left."""
        self._before = None
        common = last_common_step(before, self._points.lineage, self._step)
        if common < self._step:
            self._rewind(common)

    def _rewind(self, step: int) -> None:
        self.curves.rewind(step)
        self.seeds.rewind(step)
        self.first_step = min(self.first_step, step)

    # -- what the journal gets rows of -------------------------------------------------------------------------------

    def on_emergency(self, report: Report) -> None:
        del report
        self.journalled += 1

    def on_checkpoint_written(self, row: CheckpointRow, duration_s: float) -> None:
        del row, duration_s
        self.journalled += 1

    def on_checkpoint_failed(self, step: int, stage: str, reason: str) -> None:
        del step, stage, reason
        self.journalled += 1


def last_common_step(one: Lineage, other: Lineage, step: int) -> int:
    """Returns the last step up to `step` that both lineages passed in the same attempt."""
    steps = {step, *(last for lineage in (one, other) for _, last in lineage.forks)}
    common = [each for each in steps if each <= step and one.attempt_at(each) == other.attempt_at(each)]
    return max(common, default=0)
