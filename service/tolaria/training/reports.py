"""What the compute lane tells the event loop, and the box in which it crosses from one thread to the other.

Owns the reports and their batching. Must not know what is done about them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import HardwareContext
from tolaria.jobs import Evaluation
from tolaria.training.fences import FenceReport
from tolaria.training.growth import SeedsReport
from tolaria.training.recovery.keeper import PointsLost
from tolaria.values.gradients import SeedMetricSet
from tolaria.values.optimization import ActiveAdjustment, LearningRateViolation
from tolaria.values.profiling import TraceFailed, TraceWritten


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer update, or one that was void: not finite, so that nothing was changed.

    A `rescaled` void step is no mistake: float16's loss scale was too large and has been lowered.

    `global_step` is the number of updates done by then, `batches` are the places in the epoch of what it took. Times in
    seconds, `finished_at_s` on the monotonic clock.
    """

    global_step: int
    epoch: int
    loss: float
    gradient_norm: float
    samples: int
    duration_s: float
    input_wait_s: float
    finished_at_s: float
    void: bool = False
    violations: tuple[LearningRateViolation, ...] = ()
    rescaled: bool = False
    batches: range = range(0)


@dataclass(frozen=True, slots=True)
class EpochReport:
    """An epoch's steps and its evaluation are done; the lane waits for work. `steps_s` is the time of the steps.

    `training_loss` is the mean over the epoch's finite steps, as the state has it: undone steps do not count.
    """

    epoch: int
    global_step: int
    evaluation: Evaluation
    steps_s: float
    evaluation_s: float
    finished_at_s: float
    learning_rates: Mapping[str, float]
    momentum: float
    hardware: HardwareContext
    training_loss: float = float("nan")
    samples: int = 0
    seeds: tuple[SeedState, ...] = ()
    gradients: SeedMetricSet | None = None
    adjustments: tuple[ActiveAdjustment, ...] = ()

    @property
    def learning_rate(self) -> float:
        """The host's: the first group's."""
        return next(iter(self.learning_rates.values()), 0.0)


@dataclass(frozen=True, slots=True)
class HeldReport:
    """The lane has stopped between two microbatches, as it was told, and changes nothing until it is released.

    `hold` is the number of the order that it answers.
    """

    global_step: int
    hold: int


@dataclass(frozen=True, slots=True)
class ProfileEnded:
    """The last step of a profile is done, and its trace is written, or is not."""

    global_step: int
    outcome: TraceWritten | TraceFailed


@dataclass(frozen=True, slots=True)
class LaneEnded:
    """The lane's thread is about to end; `error` says why, if it was not told to."""

    global_step: int
    error: BaseException | None


Report = StepReport | EpochReport | SeedsReport | FenceReport | HeldReport | PointsLost | ProfileEnded | LaneEnded


class ReportBox:
    """Carries reports to the event loop, many at a time.

    Args:
        notify: called from the lane's thread, once a frame; must make the event loop call `take` soon.
        frame_s: least time between two notifications for step reports; all others notify at once.
        capacity: step reports kept at most. A lane that is so far ahead of whoever judges it waits.
    """

    def __init__(self, notify: Callable[[], None], *, frame_s: float = 0.02, capacity: int = 4096) -> None:
        self._notify = notify
        self._frame_s = frame_s
        self._capacity = capacity
        self._reports: list[Report] = []
        self._room = threading.Condition()
        self._open = True
        self._notified_at_s = 0.0

    def put(self, report: Report) -> None:
        """Add a report, from the lane's thread. A step report waits for room; after `close` nothing is kept.

        Others never wait: they are few, and the lane may hold a lock that the event loop needs to make room.
        """
        with self._room:
            while self._open and isinstance(report, StepReport) and len(self._reports) >= self._capacity:
                self._room.wait()
            if not self._open:
                return
            self._reports.append(report)
        now_s = time.monotonic()
        if not isinstance(report, StepReport) or now_s - self._notified_at_s >= self._frame_s:
            self._notified_at_s = now_s
            self._notify()

    def flush(self) -> None:
        """Have the reports so far taken now, from the lane's thread, before it is busy with something else."""
        self._notify()

    def take(self) -> list[Report]:
        """All reports so far, oldest first, from the event loop's thread."""
        with self._room:
            reports, self._reports = self._reports, []
            self._room.notify_all()
        return reports

    def close(self) -> None:
        """Nobody will take reports any more: let a waiting lane go."""
        with self._room:
            self._open = False
            self._room.notify_all()
