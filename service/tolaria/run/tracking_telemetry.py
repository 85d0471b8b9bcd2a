"""The observer that records the metrics of a run over its steps, for the log of metrics and for trackers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from pydantic import JsonValue

from leyline.v1.admin_service_pb2 import RunState
from tolaria.config import Settings
from tolaria.lane.messages import (
    EpochDone,
    LaneLost,
    LaneReady,
    OptimizerChanged,
    RegimeBegun,
    Restored,
    SeedsChanged,
    StepDone,
)
from tolaria.rollback.protocol import Ending, Rollback, tier_name
from tolaria.run.observers import RunObserver
from tolaria.run.status import RunStatus, state_name
from tolaria.trackers.supervision import Tracking
from tolaria.trackers.tracker import Note, Point, Rewind, RunEnd, TrackedRun
from tolaria.values.optimization import Adjustment
from tolaria.values.seeds import FOSSILIZED, declared_ramp

_ENDED: Final = frozenset({RunState.RUN_STATE_FINISHED, RunState.RUN_STATE_FAILED})
_NOTED: Final = frozenset({RunState.RUN_STATE_HALTED, RunState.RUN_STATE_PAUSED})


class TrackingTelemetry(RunObserver):
    """Records points, rewinds and annotations. Names of metrics: `train/`, `validation/`, `lr/` and `seeds/`."""

    def __init__(
        self, tracking: Tracking, status: RunStatus, settings: Settings, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._tracking = tracking
        self._status = status
        self._settings = settings
        self._every = settings.tracking.every_steps
        self._clock = clock
        self._rewound: int | None = None
        self._draining = False
        self._logged: dict[str, float] = {}
        """What the job has logged since the last point."""

    def on_ready(self, ready: LaneReady) -> None:
        training = self._settings.training
        self._tracking.put(
            TrackedRun(
                run_id=self._status.run_id,
                name=training.run_name,
                experiment=training.experiment,
                job=training.job,
                tags=dict(training.tags),
                settings=changed_settings(self._settings),
                global_step=ready.position.global_step,
                attempt=self._status.attempt,
                time=self._clock(),
            )
        )

    def on_state(self, state: RunState.ValueType, reason: str) -> None:
        name, draining = state_name(state), self._draining
        self._draining = state == RunState.RUN_STATE_DRAINING
        if state in _ENDED:
            if draining:  # this process ends, and the run may be resumed
                return
            self._finish_rewind()
            status = self._status
            self._tracking.put(RunEnd(status.global_step, status.attempt, self._clock(), name))
        elif state in _NOTED:
            self._note(f"{name}: {reason}" if reason else name)

    def on_step(self, step: StepDone) -> None:
        if step.skipped:
            return
        if step.logged:
            self._logged.update(step.logged)
        if step.global_step % self._every == 0:
            values = {"train/loss": step.loss, "train/gradient_norm": step.gradient_norm}
            values["train/learning_rate"] = step.learning_rate
            values |= {f"train/{name}": value for name, value in self._logged.items()}
            self._logged = {}
            self._point(step.global_step, step.epoch, values)

    def on_frame(self, status: RunStatus) -> None:
        del status
        self._finish_rewind()

    def on_epoch(self, epoch: EpochDone, *, show_layers: bool) -> None:
        del show_layers
        values = {"train/epoch_loss": epoch.training_loss}
        if epoch.evaluation.samples:
            values |= {f"validation/{name}": value for name, value in epoch.evaluation.figures().items()}
        values |= {f"lr/{group}": rate for group, rate in epoch.learning_rates.items()}
        seeds = self._status.seeds
        values["seeds/fossilized"] = float(sum(seed.stage in FOSSILIZED for seed in seeds))
        values["seeds/active"] = len(seeds) - values["seeds/fossilized"]
        ramps = ((seed.seed_id, declared_ramp(seed)) for seed in seeds)
        values |= {f"seeds/{name}/alpha": ramp.at(epoch.global_step) for name, ramp in ramps if ramp is not None}
        self._point(epoch.global_step, epoch.epoch, values)

    def on_rewind(self, restored: Restored) -> None:
        # The number of the attempt that begins is known at the end of the frame.
        self._rewound = restored.position.global_step
        self._logged = {}

    # -- annotations ---------------------------------------------------------------------------------------------------

    def on_rollback_ended(self, rollback: Rollback) -> None:
        if rollback.ending is Ending.RESTORED:
            tier, origin = tier_name(rollback.tier), rollback.origin
            self._note(f"rolled back to step {rollback.restored_step} ({tier}, by {origin}): {rollback.reason}")
        else:
            self._note(f"a rollback failed ({rollback.origin}): {rollback.error or rollback.reason}")

    def on_explosion(self, step: StepDone, reason: str) -> None:
        self._note(f"loss explosion: {reason}", step.global_step)

    def on_regime(self, regime: RegimeBegun) -> None:
        self._note(f"the losses of a changed task are accepted: {regime.reason}", regime.global_step)

    def on_seeds_changed(self, change: SeedsChanged) -> None:
        for sentence in change.changes:
            self._note(f"seeds: {sentence}", change.global_step)

    def on_adjusted(self, adjustment: Adjustment, change: OptimizerChanged) -> None:
        rates = ", ".join(f"{group} {rate:g}" for group, rate in change.after.items())
        self._note(f"learning rates adjusted by {adjustment.origin}: {rates} ({adjustment.reason})")

    def on_lane_lost(self, lost: LaneLost, step: int) -> None:
        self._note(f"the training process died: {lost.cause}", step)

    def on_lane_recovered(self, generation: int, step: int, duration_s: float) -> None:
        self._note(f"training process {generation} goes on from step {step}, after {duration_s:.1f} s")

    def _note(self, text: str, step: int | None = None) -> None:
        self._finish_rewind()
        at = self._status.global_step if step is None else step
        self._tracking.put(Note(at, self._status.attempt, self._clock(), text))

    def _point(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self._finish_rewind()
        self._tracking.put(Point(step, self._status.attempt, epoch, self._clock(), dict(values)))

    def _finish_rewind(self) -> None:
        if self._rewound is not None:
            self._tracking.put(Rewind(self._rewound, self._status.attempt, self._clock()))
            self._rewound = None


def changed_settings(settings: Settings) -> dict[str, JsonValue]:
    """Returns the settings that differ from their defaults, without secrets, by dotted name."""
    defaults, changed = Settings(), dict[str, JsonValue]()
    for name, section in settings:
        default = getattr(defaults, name)
        visible = section.model_dump(mode="json")
        changed |= {
            f"{name}.{field}": visible[field]
            for field, value in section
            if value != getattr(default, field) and "secret" not in field
        }
    return changed
