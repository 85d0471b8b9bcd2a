"""Commands to the lane and events from it: frozen dataclasses of plain values.

Everything that crosses between `run` and `lane` is defined here; `tolaria.values.encoding` documents its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import HardwareContext
from tolaria.images import SnapshotInfo, SnapshotStatistics
from tolaria.values.evaluation import Evaluation
from tolaria.values.failure import Failure
from tolaria.values.gradients import SeedMetricSet
from tolaria.values.optimization import (
    ActiveAdjustment,
    Adjustment,
    LearningRateViolation,
    RebuildResult,
    ScheduledRates,
)
from tolaria.values.training import BatchRange, EpochProgress, Position, RankInfo, RankLoad

PROFILE_STEPS_MAX: Final = 1000
"""Steps in one profile. A trace holds every operation of each step, so longer ones cannot be viewed."""


# -- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunEpoch:
    """Trains the rest of the current epoch, or else the next one, then evaluates. `order` is an increasing number."""

    order: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Stops the lane between two microbatches until `Release`; a `Held` with the same number follows."""

    number: int


@dataclass(frozen=True, slots=True)
class Release:
    """Lets a held lane go on exactly where it stopped."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Ends the lane after the current step; a held lane gives up an unfinished step. A `LaneEnded` follows."""


@dataclass(frozen=True, slots=True)
class ReconcileSeeds:
    """Brings the model to the whole desired set of seeds at the next step boundary; answered by `SeedsChanged`."""

    desired: tuple[SeedState, ...]


@dataclass(frozen=True, slots=True)
class ChangeOptimizer:
    """Adjusts learning rates, sets hyperparameters of a group (None: of all), or both; all of it or nothing."""

    adjustment: Adjustment | None
    hyperparameters: Mapping[str, float]
    group: str | None


@dataclass(frozen=True, slots=True)
class CaptureImage:
    """Captures the state at the next step boundary, also while held; answered by `ImageCaptured`.

    `beside` the ring it costs memory until the image is released, and evicts no snapshot.
    """

    beside: bool = False


@dataclass(frozen=True, slots=True)
class Restore:
    """Restores the image `image_id` (a loaded checkpoint), or with id 0 the snapshot of `target_step`.

    Live state changes before `deadline_s` (monotonic seconds) or not at all. Gives up an unfinished step. With
    `other_branch` the snapshots in memory are no ancestors of that state and are dropped.
    """

    target_step: int
    deadline_s: float
    image_id: int = 0
    other_branch: bool = False


@dataclass(frozen=True, slots=True)
class SkipBatches:
    """Adds batches, as (epoch, place in the epoch from 0), to those that training skips."""

    batches: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SetSkippedRanges:
    """Sets the batches that operators have training skip, in place of those of the last such command; in order."""

    ranges: tuple[BatchRange, ...]


@dataclass(frozen=True, slots=True)
class AcceptRegime:
    """Accepts the losses of a changed task and skips `batches` no longer; a `RegimeBegun` precedes the answer."""

    reason: str
    batches: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class CaptureProfile:
    """Profiles the next `steps` steps of one rank; answered by `ProfileStarted`, followed by `ProfileDone`."""

    steps: int
    rank: int = 0


BoundaryCommand: TypeAlias = (
    ReconcileSeeds
    | ChangeOptimizer
    | CaptureImage
    | Restore
    | SkipBatches
    | SetSkippedRanges
    | AcceptRegime
    | CaptureProfile
)
"""Commands that the lane answers with a `CommandDone`, at a step boundary."""

Command: TypeAlias = RunEpoch | Hold | Release | Stop | BoundaryCommand

# -- results of commands ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SeedsChanged:
    """Changes of seeds at a step boundary, by a command or because a ramp or a postponed rebuild was due.

    `changes` are sentences, `refusals` pairs of seed and reason. `rebuild` is None where none was due; a non-empty
    `rebuild_error` says why it failed: the previous optimizer stays in use.
    """

    global_step: int
    states: tuple[SeedState, ...] = ()
    changes: tuple[str, ...] = ()
    refusals: tuple[tuple[str, str], ...] = ()
    rebuild: RebuildResult | None = None
    rebuild_error: str = ""


@dataclass(frozen=True, slots=True)
class OptimizerChanged:
    """Learning rates by group before and after, and the other hyperparameters that changed, as sentences.

    `limits`: where the controller's adjustment exceeded its authority, as sentences.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]
    hyperparameters: tuple[str, ...]
    adjustments: tuple[ActiveAdjustment, ...] = ()
    limits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageCaptured:
    """The state is captured as `image_id` in the image pool; the receiver has to release it."""

    image_id: int


@dataclass(frozen=True, slots=True)
class Restored:
    """The live state is the one captured at `position`.

    `state_digest` is of the live state after the restore, `expected_digest` the one recorded at its capture.
    `underway`: the lane goes on with that epoch without a further order; `latest_order` is the newest it has received.
    `losses` is the state of its `LossWindow`, as JSON.
    """

    position: Position
    state_digest: str
    expected_digest: str
    restore_ms: float
    progress: EpochProgress
    seeds: tuple[SeedState, ...]
    learning_rates: Mapping[str, float]
    adjustments: tuple[ActiveAdjustment, ...]
    underway: bool = False
    latest_order: int = 0
    losses: str = ""


@dataclass(frozen=True, slots=True)
class BatchesSkipped:
    """Number of batches that are skipped in all epochs."""

    count: int


@dataclass(frozen=True, slots=True)
class TraceWritten:
    """A trace was written to `path`; `removed` older traces were deleted to make room.

    Ending the profile and exporting the trace blocked the lane for `export_s` seconds.
    """

    path: str
    size_bytes: int
    steps: int
    export_s: float
    removed: int


@dataclass(frozen=True, slots=True)
class TraceFailed:
    """The profile left no trace; training is unaffected. `stage` is where it failed."""

    stage: Literal["start", "export", "cap"]
    reason: str


@dataclass(frozen=True, slots=True)
class ProfileStarted:
    """A profile of `steps` steps has started."""

    steps: int


Result: TypeAlias = (
    SeedsChanged | OptimizerChanged | ImageCaptured | Restored | BatchesSkipped | ProfileStarted | TraceFailed
)

# -- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LaneReady:
    """What the lane has built: where training starts, and what it trains with. `losses` is as in `Restored`."""

    position: Position
    progress: EpochProgress
    steps_per_epoch: int
    device: str
    torch_version: str
    fast_paths: Mapping[str, str]
    fast_paths_running: tuple[str, ...]
    fast_path_failures: tuple[tuple[str, str], ...]
    learning_rates: Mapping[str, float]
    adjustments: tuple[ActiveAdjustment, ...]
    seeds: tuple[SeedState, ...]
    losses: str = ""
    notes: tuple[str, ...] = ()
    """What the operator should know about the job's data; sentences."""
    slots: tuple[str, ...] = ()
    ranks: tuple[RankInfo, ...] = ()
    model: str = ""  # as `tolaria.lane.model_description` describes it
    schedule: str = ""  # of learning rates, if the job gives one
    evaluates: bool = True


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step, or a *skipped* one: nothing changed, not even `global_step`.

    A step is skipped because it was not finite or, with `judged` set, because its loss is extreme (`LossWindow`).
    A skipped step that is `rescaled` only lowered the loss scale of float16. `batches` are the places in the epoch of
    the microbatches it took, `left_out` those among them that were not finite while others were. `judged` is the mean
    loss of the sources that are not seeds; None if they had no sample. `dropped_seeds` are isolated seeds whose
    gradients were not finite and were dropped. `parameters_finite` is the result of a check of the parameters after
    many skipped steps; False too after any step, also one that was taken, in which a large buffer that had never
    changed before was changed by what was left out: it cannot be restored, since there is no copy. None otherwise.
    Times are seconds, `finished_at_s` on the monotonic clock; `copy_s` is the part of `input_wait_s` that copies to the
    device took.
    """

    global_step: int
    epoch: int
    loss: float
    gradient_norm: float
    samples: int
    duration_s: float
    input_wait_s: float
    finished_at_s: float
    skipped: bool = False
    violations: tuple[LearningRateViolation, ...] = ()
    rescaled: bool = False
    batches: range = range(0)
    judged: float | None = None
    left_out: tuple[int, ...] = ()
    dropped_seeds: tuple[str, ...] = ()
    parameters_finite: bool | None = None
    copy_s: float = 0.0
    logged: Mapping[str, float] = field(default_factory=dict)  # by the job, by name
    learning_rate: float = 0.0  # of the first param group, in this step


@dataclass(frozen=True, slots=True)
class RegimeBegun:
    """The window of losses was emptied for a changed task; the next `StepDone` is judged by the new one.

    `announced` by the job; otherwise by a command, and the losses that waited to enter the window are in it now.
    """

    global_step: int
    reason: str
    announced: bool


@dataclass(frozen=True, slots=True)
class EpochDone:
    """The steps of an epoch and its evaluation are done. `training_loss` is the mean over the epoch's finite steps.

    `compile_fallback` is why parts of the model run uncompiled since this epoch; empty otherwise. `rank_loads` are by
    rank; empty for a process alone.
    """

    epoch: int
    global_step: int
    evaluation: Evaluation
    steps_s: float
    finished_at_s: float
    learning_rates: Mapping[str, float]
    momentum: float
    hardware: HardwareContext
    training_loss: float = float("nan")
    samples: int = 0
    seeds: tuple[SeedState, ...] = ()
    gradients: SeedMetricSet | None = None
    adjustments: tuple[ActiveAdjustment, ...] = ()
    compile_fallback: str = ""
    rank_loads: tuple[RankLoad, ...] = ()
    stop: str = ""  # why the run ends with this epoch
    scheduled: ScheduledRates | None = None  # what the job's schedule has changed
    missing_metrics: Mapping[str, str] = field(default_factory=dict)  # what it lacks, by what in the lane names it


@dataclass(frozen=True, slots=True)
class CommandDone:
    """The command `command_id` was carried out, or refused with `failure`: then nothing has changed."""

    command_id: int
    global_step: int
    result: Result | None
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class Held:
    """The lane is held between two microbatches by the `Hold` with that number."""

    global_step: int
    number: int


@dataclass(frozen=True, slots=True)
class SnapshotsChanged:
    """The snapshots in memory that can be restored, oldest first, and the ring's counters."""

    points: tuple[SnapshotInfo, ...]
    statistics: SnapshotStatistics


@dataclass(frozen=True, slots=True)
class SnapshotsUnavailable:
    """No snapshots are taken, for this reason; an empty one means that they are taken again."""

    reason: str


@dataclass(frozen=True, slots=True)
class ProfileDone:
    """The last step of a profile is done; its trace is written, or failed."""

    global_step: int
    outcome: TraceWritten | TraceFailed


@dataclass(frozen=True, slots=True)
class LaneEnded:
    """The lane has ended; `failure` is None when it was stopped. No event follows."""

    global_step: int
    failure: Failure | None


LOSS_KINDS: Final = (
    *("killed", "crashed", "exited", "raised", "out_of_memory", "silent", "connection"),
    *("node_lost", "regrouped"),
)
"""Why a lane's process ends: a signal from outside, one of a crash such as SIGSEGV, an exit, an exception, no memory in
its cgroup, no heartbeat, what it sent; another machine of its group that has gone, or one that is taken in."""


@dataclass(frozen=True, slots=True)
class LaneLost:
    """The lane's process number `generation` has ended, for that cause, before it was to end.

    `kind` is one of `LOSS_KINDS`; `batch` is the one that was in flight, as (epoch, place). What the process had not
    answered is lost. A `LaneRestarted` follows, or a `LaneEnded` if it is not started again.
    """

    generation: int
    kind: str
    cause: str
    batch: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class LaneRestarted:
    """The lane is built anew in process number `generation`, and has restored the state that `ready` describes.

    It has the snapshots in memory of the processes before; a `SnapshotsChanged` with them follows.
    """

    generation: int
    ready: LaneReady


SnapshotEvent: TypeAlias = SnapshotsChanged | SnapshotsUnavailable

ProcessEvent: TypeAlias = LaneLost | LaneRestarted | LaneEnded

Event: TypeAlias = (
    StepDone | EpochDone | SeedsChanged | RegimeBegun | CommandDone | Held | SnapshotEvent | ProfileDone | ProcessEvent
)
