"""The policy of the reference Tamiyo: pure functions of a run's history and its newest state.

A decision is an `AdaptationCommand` without id, time and signature, and with an annotation `reason`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from leyline.v1 import enums_pb2 as enums
from leyline.v1.commands_pb2 import AdaptationCommand, CommandSeedOperation
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.reference.lifecycle import ACTIVE_STAGES, BLUEPRINTS, Operation

EPOCHS_MAX, TRIALS_MAX = 256, 64  # bounds of the history of one run

# When Tamiyo acts. Epochs are those of the training run; losses are compared by ratio.
PLATEAU_EPOCHS = 3  # without improvement; the demo reaches a plateau within a minute
PLATEAU_MARGIN = 0.02  # relative improvement of the validation loss that counts; the noise of an epoch is smaller
ACTIVE_MAX = 2  # active seeds; the effects of two can still be separated
YOUNG_EPOCHS = 4  # age below which a seed prevents another germination; by then it has begun to learn
VOLATILE_EPOCHS = 5  # latest changes of the training loss; enough to distinguish a pattern from an outlier
VOLATILE_RISE = 0.2  # relative rise of the training loss that counts as a jump; above the noise of an epoch
VOLATILE_JUMPS = 2  # jumps that make a loss volatile; a single one can be a hard batch
LR_FACTOR = 0.5  # on the learning rates of a run with a volatile loss; the customary halving
LR_CHANGES_MAX = 3  # in a run; a loss that is still volatile at an eighth of the rate is noisy
DIVERGENCE_RATIO = 3.0  # training loss over its best; the noise of an epoch is smaller
DIVERGENCE_SHARE = 0.25  # of the total improvement that must be lost too; tiny losses triple without harm
PAUSE_EPOCHS = 5  # between two rollbacks, or two changes of the learning rate; the first must take effect
PROBATION_EPOCHS = 3  # before a seed is judged; what Kasmina's gate requires
ACCURACY_DROP_MAX = 0.005  # validation accuracy (0 to 1) that a seed may cost; stricter than Kasmina's gate

_WITH_EFFECT = frozenset({enums.SEED_STAGE_BLENDING, enums.SEED_STAGE_SHADOWING, enums.SEED_STAGE_PROBATIONARY})


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch as it was reported, and the decision on it. Losses may be NaN or infinite."""

    epoch: int
    step: int
    training_loss: float
    validation_loss: float
    accuracy: float
    decision: AdaptationCommand | None = None


@dataclass(frozen=True, slots=True)
class SeedTrial:
    """The step at which a seed first had an effect, the validation accuracy before it, and its probation so far."""

    seed_id: str
    step: int
    accuracy_before: float
    probation_step: int | None = None
    probation_epoch: int | None = None

    def rewound(self, target_step: int) -> SeedTrial:
        """Returns the trial without a probation that began after `target_step`."""
        began = self.probation_step is not None and self.probation_step <= target_step
        return self if began else replace(self, probation_step=None, probation_epoch=None)


@dataclass(frozen=True, slots=True)
class RunHistory:
    """A run so far. `first_loss` and `rate_changes` (their steps) outlive the records, which are bounded."""

    first_loss: float = math.nan
    records: tuple[EpochRecord, ...] = ()
    trials: tuple[SeedTrial, ...] = ()
    rollback_asked_step: int | None = None
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
            rate_changes=kept.rate_changes,
        )

    def with_decision(self, decision: AdaptationCommand | None) -> RunHistory:
        """Returns the history with the decision on its newest record."""
        newest = replace(self.records[-1], decision=decision)
        changed = (newest.step,) if decision and decision.command_type == enums.COMMAND_OPTIMIZER else ()
        return replace(self, records=(*self.records[:-1], newest), rate_changes=(*self.rate_changes, *changed))

    def rewound(self, target_step: int) -> RunHistory:
        """Returns the history without anything after `target_step`."""
        records = tuple(record for record in self.records if record.step <= target_step)
        if len(records) == len(self.records):
            return self
        trials = tuple(trial.rewound(target_step) for trial in self.trials if trial.step <= target_step)
        # A rollback restores the learning rates too, so a change that it undoes does not count.
        changes = tuple(step for step in self.rate_changes if step <= target_step)
        return RunHistory(self.first_loss if records else math.nan, records, trials, rate_changes=changes)


def decide_epoch(history: RunHistory, state: SystemStatePacket) -> tuple[RunHistory, AdaptationCommand | None]:
    """Returns the history after an epoch, and the most urgent decision; None means no change."""
    history = history.with_epoch(state)
    decision = (
        (None if _recently(history, enums.COMMAND_ROLLBACK) else _divergence(history, state.training_loss))
        or _verdict_on_probation(history, state)
        or _lower_rates(history)
        or _germination(history, state)
    )
    return history.with_decision(decision), decision


def decide_step(history: RunHistory, state: SystemStatePacket) -> tuple[RunHistory, AdaptationCommand | None]:
    """Decides between epochs: a rollback on divergence, once. The moving average of the loss counts, not one batch."""
    history = history.rewound(state.global_step)
    if history.rollback_asked_step is not None and history.rollback_asked_step <= state.global_step:
        return history, None
    finite = math.isfinite(state.training_loss)
    decision = _divergence(history, state.training_metrics.get("loss_ewma", 0.0) if finite else state.training_loss)
    return replace(history, rollback_asked_step=state.global_step if decision else None), decision


def _trials_after(kept: RunHistory, state: SystemStatePacket) -> tuple[SeedTrial, ...]:
    """Returns the trials of the seeds that have an effect in `state`; those of others are dropped."""
    known = {trial.seed_id: trial for trial in kept.trials}
    # The best accuracy so far of any trial: a harmful older seed must not lower the standard.
    latest = kept.records[-1].accuracy if kept.records else state.validation_accuracy
    before = max(_finite((latest, *(trial.accuracy_before for trial in kept.trials))), default=-math.inf)
    trials = []
    for seed in {seed.seed_id: seed for seed in state.seed_states if seed.stage in _WITH_EFFECT}.values():
        trial = known.get(seed.seed_id) or SeedTrial(seed.seed_id, state.global_step, before)
        if seed.stage != enums.SEED_STAGE_PROBATIONARY:
            trial = trial.rewound(-1)
        elif trial.probation_step is None:
            trial = replace(trial, probation_step=state.global_step, probation_epoch=state.current_epoch)
        trials.append(trial)
    return tuple(trials[:TRIALS_MAX])


def _divergence(history: RunHistory, loss: float) -> AdaptationCommand | None:
    if not math.isfinite(loss):
        return _fast_rollback(f"training loss is {loss}")
    best = min(_finite(record.training_loss for record in history.records), default=math.nan)
    # Ratios require positive losses. NaN, where nothing is recorded, compares false.
    far = best > 0.0 and loss > DIVERGENCE_RATIO * best
    if far and loss - best > DIVERGENCE_SHARE * (history.first_loss - best):
        return _fast_rollback(f"training loss {loss:.4g} is {loss / best:.1f} times its best {best:.4g}")
    return None


def _verdict_on_probation(history: RunHistory, state: SystemStatePacket) -> AdaptationCommand | None:
    """Fossilizes or culls the first seed whose probation is over; decides nothing without a finite accuracy."""
    after = state.validation_accuracy
    if not math.isfinite(after):
        return None
    for trial in history.trials:
        if trial.probation_epoch is None or state.current_epoch - trial.probation_epoch < PROBATION_EPOCHS:
            continue
        before = trial.accuracy_before
        harmless = after >= before - ACCURACY_DROP_MAX
        was = f"{before:.2%}" if math.isfinite(before) else "unknown"
        reason = f"validation accuracy is {after:.2%} after its probation, was {was} before it blended"
        operation = enums.SEED_OP_FOSSILIZE if harmless else enums.SEED_OP_CULL
        return _seed_operation(operation, reason, seed_id=trial.seed_id)
    return None


def _lower_rates(history: RunHistory) -> AdaptationCommand | None:
    if len(history.rate_changes) >= LR_CHANGES_MAX:
        return None
    losses = [record.training_loss for record in history.records[-VOLATILE_EPOCHS - 1 :]]
    jumps = sum(after - before > VOLATILE_RISE * abs(before) for before, after in pairwise(losses))
    if jumps < VOLATILE_JUMPS or _recently(history, enums.COMMAND_OPTIMIZER):
        return None
    reason = f"training loss rose by over {VOLATILE_RISE:.0%} in {jumps} of the latest {len(losses) - 1} epochs"
    decision = AdaptationCommand(command_type=enums.COMMAND_OPTIMIZER, annotations={"reason": reason})
    decision.optimizer_adjustment.hyperparameters["lr_factor"] = LR_FACTOR
    return decision


def _germination(history: RunHistory, state: SystemStatePacket) -> AdaptationCommand | None:
    active = [seed for seed in state.seed_states if seed.stage in ACTIVE_STAGES]
    if len(active) >= ACTIVE_MAX or any(seed.age_epochs < YOUNG_EPOCHS for seed in active):
        return None
    # The latest germination counts as well: its seed may not be reported yet.
    past = [
        (record.epoch, record.decision.seed_operation.blueprint_id)
        for record in history.records
        if record.decision and record.decision.seed_operation.operation == enums.SEED_OP_GERMINATE
    ]
    young = past and state.current_epoch - past[-1][0] < YOUNG_EPOCHS
    if young or not _plateau(history.records):
        return None
    turn = BLUEPRINTS.index(past[-1][1]) + 1 if past else 0
    best = min(_finite(record.validation_loss for record in history.records))
    reason = f"no real improvement for {PLATEAU_EPOCHS} epochs; best validation loss {best:.4g}"
    return _seed_operation(enums.SEED_OP_GERMINATE, reason, blueprint_id=BLUEPRINTS[turn % len(BLUEPRINTS)])


def _plateau(records: tuple[EpochRecord, ...]) -> bool:
    """Returns whether the best validation loss of the latest epochs does not improve on the best before them."""
    recent = _finite(record.validation_loss for record in records[-PLATEAU_EPOCHS:])
    before = _finite(record.validation_loss for record in records[:-PLATEAU_EPOCHS])
    if not before or len(recent) < PLATEAU_EPOCHS:
        return False
    return min(recent) > min(before) - PLATEAU_MARGIN * abs(min(before))


def _recently(history: RunHistory, command_type: enums.CommandType.ValueType) -> bool:
    decided = [r.epoch for r in history.records if r.decision and r.decision.command_type == command_type]
    return any(history.records[-1].epoch - epoch < PAUSE_EPOCHS for epoch in decided)


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _fast_rollback(reason: str) -> AdaptationCommand:
    decision = AdaptationCommand(command_type=enums.COMMAND_ROLLBACK, annotations={"reason": reason})
    decision.rollback_payload.update({"tier": "fast", "reason": reason})
    return decision


def _seed_operation(
    operation: Operation, reason: str, *, seed_id: str = "", blueprint_id: str = ""
) -> AdaptationCommand:
    return AdaptationCommand(
        command_type=enums.COMMAND_SEED,
        target_seed_id=seed_id,
        seed_operation=CommandSeedOperation(operation=operation, blueprint_id=blueprint_id),
        annotations={"reason": reason},
    )
