"""The base class of a run's observers, and the observer that passes every call to all others.

Observers write metrics, events, log lines and journal rows. They return nothing and decide nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from leyline.v1.admin_service_pb2 import RunState
from leyline.v1.enums_pb2 import CircuitBreakerState, RollbackTier
from leyline.v1.seeds_pb2 import SeedState
from tolaria.checkpoint.store import Damage
from tolaria.emergency import Report
from tolaria.errors import CommandRejectedError
from tolaria.images import SnapshotStatistics
from tolaria.journal.rows import CheckpointRow
from tolaria.lane.messages import (
    EpochDone,
    LaneLost,
    LaneReady,
    OptimizerChanged,
    RegimeBegun,
    Restored,
    SeedsChanged,
    StepDone,
    TraceFailed,
    TraceWritten,
)
from tolaria.peers.consultation import Consultation
from tolaria.resilience.conservative import ModeChange
from tolaria.rollback.protocol import Rollback
from tolaria.run.status import RunStatus
from tolaria.values.optimization import Adjustment
from tolaria.values.training import BatchRange


class RunObserver:
    """Observes a run on its event loop. Every hook does nothing unless it is overridden."""

    # -- training ----------------------------------------------------------------------------------------------------

    def on_ready(self, ready: LaneReady) -> None:
        """The lane has been built."""

    def on_state(self, state: RunState.ValueType, reason: str) -> None:
        """The run has changed its state."""

    def on_epoch_started(self, epoch: int) -> None:
        """The lane has been ordered to train an epoch."""

    def on_step(self, step: StepDone) -> None:
        """A step is done or was skipped."""

    def on_data_skipped(self, skip_id: str, ranges: Sequence[BatchRange], *, removed: bool) -> None:
        """An operator has batches left out, or has undone that."""

    def on_explosion(self, step: StepDone, reason: str) -> None:
        """A finite step was judged an explosion."""

    def on_regime(self, regime: RegimeBegun) -> None:
        """The losses of a changed task are accepted as healthy."""

    def on_seed_culled(self, seed_id: str, step: int) -> None:
        """A seed is removed because its gradients were not finite in too many steps in a row."""

    def on_frame(self, status: RunStatus) -> None:
        """A frame of the lane's events has been applied."""

    def on_epoch(self, epoch: EpochDone, *, show_layers: bool) -> None:
        """An epoch and its evaluation are done; `show_layers` enables metrics with a series for each layer."""

    def on_metric_missing(self, setting: str, metric: str, known: Sequence[str]) -> None:
        """The metric that a setting names has not occurred; `known` are those that there are."""

    def on_boundary(self, status: RunStatus, epoch: EpochDone, *, budget_ms: float, breach: bool) -> None:
        """An epoch boundary is over; `budget_ms` is infinite if it waits for every answer."""

    def on_step_question(self, step: int, latency_ms: float, *, budget_ms: float, breach: bool) -> None:
        """The controller has been asked between epochs, which took `latency_ms` on the event loop."""

    def on_health(self, saved: str) -> None:
        """The record by which health is judged may have changed; `saved` is `Health.to_json()`."""

    def on_rewind(self, restored: Restored) -> None:
        """The lane has restored an earlier state."""

    # -- the lane's process ------------------------------------------------------------------------------------------

    def on_lane_lost(self, lost: LaneLost, step: int) -> None:
        """The lane's process has died after `step`."""

    def on_lane_recovered(self, generation: int, step: int, duration_s: float) -> None:
        """The next process goes on from `step`, `duration_s` after the first death."""

    # -- commands, seeds, learning rates -----------------------------------------------------------------------------

    def on_command_applied(self, consultation: Consultation) -> None:
        """The controller's command has taken effect."""

    def on_command_rejected(self, rejection: CommandRejectedError) -> None:
        """A command was rejected; nothing has changed."""

    def on_seeds(self, states: Sequence[SeedState]) -> None:
        """`states` are all current seeds, including desired ones."""

    def on_seeds_changed(self, change: SeedsChanged) -> None:
        """Seeds or the optimizer's groups have changed at a step boundary."""

    def on_seeds_failed(self, reason: str) -> None:
        """The desired seeds could not be reconciled at all."""

    def on_learning_rates(self, rates: dict[str, float]) -> None:
        """`rates` are the current learning rates of all groups."""

    def on_adjusted(self, adjustment: Adjustment, change: OptimizerChanged) -> None:
        """Learning rates have been adjusted."""

    # -- safety ------------------------------------------------------------------------------------------------------

    def on_breaker(self, name: str, state: CircuitBreakerState.ValueType) -> None:
        """A breaker has changed its state."""

    def on_mode(self, change: ModeChange) -> None:
        """Reasons for conservative mode have been added or removed."""

    def on_epoch_failed(self) -> None:
        """An epoch counts as failed."""

    def on_emergency(self, report: Report) -> None:
        """The emergency controller has reported an event."""

    # -- rollback, checkpoints, profiles -----------------------------------------------------------------------------

    def on_snapshots(self, statistics: SnapshotStatistics) -> None:
        """The snapshots in memory have changed."""

    def on_snapshots_unavailable(self, reason: str) -> None:
        """No snapshots are taken, for this reason; an empty one means that they are taken again."""

    def on_rollback_started(self, rollback: Rollback) -> None:
        """A rollback has begun."""

    def on_rollback_ended(self, rollback: Rollback) -> None:
        """A rollback has ended, successfully or not."""

    def on_rollback_duration(self, tier: RollbackTier.ValueType, outcome: str, duration_s: float) -> None:
        """A rollback took `duration_s` from its trigger to the first good step, or to its end."""

    def on_rollback_recovered(self, rollback: Rollback, duration_s: float, step: int) -> None:
        """The first good step after a rollback is done, `duration_s` after its trigger."""

    def on_checkpoint_damaged(self, rollback_id: str, damage: Damage) -> None:
        """A checkpoint could not be loaded; an older one is tried."""

    def on_checkpoint_written(self, row: CheckpointRow, duration_s: float) -> None:
        """A checkpoint has been committed."""

    def on_checkpoint_failed(self, step: int, stage: str, reason: str) -> None:
        """A checkpoint could not be written."""

    def on_checkpoint_stalled(self, step: int, stalled_s: float) -> None:
        """A checkpoint is taking unusually long."""

    def on_profile_started(self, steps: int) -> None:
        """A profile has started."""

    def on_profile_ended(self, outcome: TraceWritten | TraceFailed) -> None:
        """A profile has ended, or could not be started."""

    def on_profile_abandoned(self) -> None:
        """The run has ended during a profile."""


class Observers(RunObserver):
    """Passes every call to all observers that override its hook, in their order."""

    def __init__(self, *observers: RunObserver) -> None:
        for hook, default in vars(RunObserver).items():
            if hook.startswith("on_"):
                overriding = [observer for observer in observers if getattr(type(observer), hook) is not default]
                setattr(self, hook, partial(_call_all, [getattr(observer, hook) for observer in overriding]))


def _call_all(methods: Sequence[Callable[..., None]], *args: Any, **kwargs: Any) -> None:
    for method in methods:
        method(*args, **kwargs)
