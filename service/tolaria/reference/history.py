"""What the reference Tamiyo remembers of a run, and the file that a restart reads it from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

import structlog
from pydantic import TypeAdapter, ValidationError

from leyline.v1 import enums_pb2 as enums
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.values.seeds import FOSSILIZED, GROWING

EPOCHS_MAX, TRIALS_MAX, OUTCOMES_MAX = 64, 64, 16  # bounds of the history of one run
RUNS_MAX: Final = 8
"""Number of runs whose files are kept."""

Decision: TypeAlias = Literal["", "germinate", "fossilize", "cull", "optimizer"]

_WITH_EFFECT: Final = GROWING - {enums.SEED_STAGE_GERMINATED, enums.SEED_STAGE_TRAINING}
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch as it was reported, and the decision on it. Losses and accuracies may be NaN or infinite."""

    epoch: int
    step: int
    training_loss: float
    validation_loss: float
    accuracy: float
    decision: Decision = ""
    blueprint: str = ""


@dataclass(frozen=True, slots=True)
class SeedTrial:
    """A seed that grows: the step at which it first had an effect, the accuracy before that, and its probation."""

    seed_id: str
    seen_step: int
    effect_step: int | None = None
    accuracy_before: float = math.nan
    probation_step: int | None = None
    probation_epoch: int | None = None

    def rewound(self, target_step: int) -> SeedTrial:
        """Returns the trial without what began after `target_step`."""
        if self.effect_step is None or self.effect_step > target_step:
            return SeedTrial(self.seed_id, self.seen_step)
        began = self.probation_step is not None and self.probation_step <= target_step
        return self if began else replace(self, probation_step=None, probation_epoch=None)


@dataclass(frozen=True, slots=True)
class SeedOutcome:
    """Whether a seed, which stopped growing by `step`, had improved a validation figure."""

    seed_id: str
    step: int
    gained: bool


@dataclass(frozen=True, slots=True)
class RunHistory:
    """A run so far. `first_loss` and `rate_changes` (their steps) outlive the records, which are bounded."""

    first_loss: float = math.nan
    records: tuple[EpochRecord, ...] = ()
    trials: tuple[SeedTrial, ...] = ()
    outcomes: tuple[SeedOutcome, ...] = ()
    rate_changes: tuple[int, ...] = ()

    def with_epoch(self, state: SystemStatePacket) -> RunHistory:
        """Returns the history with an epoch's state added; records of its step or later are dropped as undone."""
        kept = self.rewound(state.global_step - 1)
        losses = state.training_loss, state.validation_loss
        record = EpochRecord(state.current_epoch, state.global_step, *losses, state.validation_accuracy)
        return RunHistory(
            first_loss=kept.first_loss if math.isfinite(kept.first_loss) else state.training_loss,
            records=(*kept.records, record)[-EPOCHS_MAX:],
            trials=_trials_after(kept, state),
            outcomes=(*kept.outcomes, *_outcomes_of(kept, state))[-OUTCOMES_MAX:],
            rate_changes=kept.rate_changes,
        )

    def with_decision(self, decision: Decision, blueprint: str) -> RunHistory:
        """Returns the history with the decision on its newest record."""
        newest = replace(self.records[-1], decision=decision, blueprint=blueprint)
        changed = (newest.step,) if decision == "optimizer" else ()
        return replace(self, records=(*self.records[:-1], newest), rate_changes=(*self.rate_changes, *changed))

    def rewound(self, target_step: int) -> RunHistory:
        """Returns the history without anything after `target_step`."""
        records = tuple(record for record in self.records if record.step <= target_step)
        if len(records) == len(self.records):
            return self
        return RunHistory(
            self.first_loss if records else math.nan,
            records,
            trials=tuple(trial.rewound(target_step) for trial in self.trials if trial.seen_step <= target_step),
            outcomes=tuple(outcome for outcome in self.outcomes if outcome.step <= target_step),
            # A rollback restores the learning rates too, so a change that it undoes does not count.
            rate_changes=tuple(step for step in self.rate_changes if step <= target_step),
        )


class HistoryFiles:
    """Files with the histories of runs in a directory, one each. Without a directory nothing outlives the process."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._failing = ""

    def load(self, run_id: str) -> RunHistory:
        """Returns the history of a run; an empty one if there is no file, or an unreadable one."""
        if self._directory is None:
            return RunHistory()
        try:
            return _HISTORY.validate_python(json.loads(self._path(self._directory, run_id).read_bytes()))
        except FileNotFoundError:
            return RunHistory()
        except (OSError, ValueError, ValidationError) as error:
            _log.warning("history_not_read", run_id=run_id, error=f"{type(error).__name__}: {error}")
            return RunHistory()

    def save(self, run_id: str, history: RunHistory) -> None:
        """Replaces the file of a run as a whole; a failure is logged when it begins."""
        if self._directory is None:
            return
        path = self._path(self._directory, run_id)
        try:
            if not path.exists():
                self._make_room(self._directory)
            temporary = path.with_suffix(".new")
            temporary.write_text(json.dumps(asdict(history)))
            Path(temporary).replace(path)
            self._failing = ""
        except OSError as error:
            if not self._failing:
                _log.warning("history_not_saved", run_id=run_id, error=str(error))
            self._failing = str(error)

    @staticmethod
    def _path(directory: Path, run_id: str) -> Path:
        return directory / f"tamiyo-{hashlib.sha256(run_id.encode()).hexdigest()[:16]}.json"

    @staticmethod
    def _make_room(directory: Path) -> None:
        """Creates the directory, and removes the files of the runs that were decided on least recently."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        oldest_first = sorted(directory.glob("tamiyo-*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in oldest_first[: max(0, len(oldest_first) - RUNS_MAX + 1)]:
            path.unlink(missing_ok=True)


_HISTORY: Final = TypeAdapter(RunHistory)


def finite(values: Iterable[float]) -> list[float]:
    """Returns the finite ones of some values."""
    return [value for value in values if math.isfinite(value)]


def _growing(state: SystemStatePacket) -> dict[str, SeedState]:
    return {seed.seed_id: seed for seed in state.seed_states if seed.stage in GROWING}


def _trials_after(kept: RunHistory, state: SystemStatePacket) -> tuple[SeedTrial, ...]:
    """Returns the trials of the seeds that grow in `state`; those of others are dropped."""
    known = {trial.seed_id: trial for trial in kept.trials}
    # The best accuracy before any present trial: a harmful older seed must not lower the standard.
    latest = kept.records[-1].accuracy if kept.records else state.validation_accuracy
    before = max(finite((latest, *(trial.accuracy_before for trial in kept.trials))), default=-math.inf)
    trials = []
    for seed in _growing(state).values():
        trial = known.get(seed.seed_id) or SeedTrial(seed.seed_id, state.global_step)
        if seed.stage not in _WITH_EFFECT:
            trial = trial.rewound(-1)
        elif trial.effect_step is None:
            trial = replace(trial, effect_step=state.global_step, accuracy_before=before)
        if seed.stage != enums.SEED_STAGE_PROBATIONARY:
            trial = replace(trial, probation_step=None, probation_epoch=None)
        elif trial.probation_step is None:
            trial = replace(trial, probation_step=state.global_step, probation_epoch=state.current_epoch)
        trials.append(trial)
    return tuple(trials[:TRIALS_MAX])


def _outcomes_of(kept: RunHistory, state: SystemStatePacket) -> tuple[SeedOutcome, ...]:
    """Returns the outcomes of the seeds that grew until now: they are part of the host, or gone."""
    growing = _growing(state)
    fossilized = {seed.seed_id for seed in state.seed_states if seed.stage in FOSSILIZED}
    return tuple(
        SeedOutcome(trial.seed_id, state.global_step, trial.seed_id in fossilized and gained(kept, trial))
        for trial in kept.trials
        if trial.seed_id not in growing
    )


GAIN_ACCURACY, GAIN_LOSS = 0.002, 0.05
"""Improvements of the best validation accuracy (0 to 1) and loss (relative) that count; above the noise of an epoch."""


def gained(history: RunHistory, trial: SeedTrial) -> bool:
    """Returns whether the best validation figures since a seed's probation are better than the best before its effect.

    False where either is unknown: growth needs evidence.
    """
    if trial.effect_step is None:
        return False
    since = trial.effect_step if trial.probation_step is None else trial.probation_step
    old = [record for record in history.records if record.step < trial.effect_step]
    new = [record for record in history.records if record.step >= since]
    accuracy = max(finite(r.accuracy for r in new), default=-math.inf)
    accuracy_before = max(finite(r.accuracy for r in old), default=math.inf)
    loss = min(finite(r.validation_loss for r in new), default=math.inf)
    loss_before = min(finite(r.validation_loss for r in old), default=-math.inf)
    return accuracy > accuracy_before + GAIN_ACCURACY or loss < loss_before - GAIN_LOSS * abs(loss_before)
