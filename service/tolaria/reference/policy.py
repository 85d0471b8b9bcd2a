"""The policy of the reference Tamiyo: pure functions of a run's history and its newest state.

A decision is an `AdaptationCommand` without id, time and signature, and with an annotation `reason`. There is none for
a loss that diverges: the service itself judges the health of training.
"""

from __future__ import annotations

import math
from itertools import pairwise

from leyline.v1 import enums_pb2 as enums
from leyline.v1.commands_pb2 import AdaptationCommand, CommandSeedOperation
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.reference.history import Decision, EpochRecord, RunHistory, finite
from tolaria.reference.lifecycle import BLUEPRINTS, Operation
from tolaria.values.seeds import FOSSILIZED_LEFT, GROWING, SLOTS_FREE

# When Tamiyo acts. Epochs are those of the training run; losses are compared by ratio.
PLATEAU_EPOCHS = 3  # without improvement; the demo reaches a plateau within a minute
PLATEAU_MARGIN = 0.02  # relative improvement of the validation loss that counts; the noise of an epoch is smaller
ACTIVE_MAX = 2  # active seeds; the effects of two can still be separated
YOUNG_EPOCHS = 4  # age below which a seed prevents another germination; by then it has begun to learn
GAINLESS_MAX = 2  # seeds in a row without a gain after which the model is large enough; one can be bad luck
VOLATILE_EPOCHS = 5  # latest changes of the training loss; enough to distinguish a pattern from an outlier
VOLATILE_RISE = 0.2  # relative rise of the training loss that counts as a jump; above the noise of an epoch
VOLATILE_SHARE = 0.05  # of the total improvement that a jump must lose too; tiny losses double without harm
VOLATILE_JUMPS = 2  # jumps that make a loss volatile; a single one can be a hard batch
LR_FACTOR = 0.5  # on the learning rates of a run with a volatile loss; the customary halving
LR_EPOCHS = 10  # for which it applies; the schedule knows better than a rate that stays low
LR_CHANGES_MAX = 3  # in a run; a loss that is still volatile then is noisy
PAUSE_EPOCHS = 5  # between two changes of the learning rate; the first must take effect
PROBATION_EPOCHS = 3  # before a seed is judged; what Kasmina's gate requires
ACCURACY_DROP_MAX = 0.005  # validation accuracy (0 to 1) that a seed may cost; stricter than Kasmina's gate

_DECISIONS: dict[int, Decision] = {
    enums.SEED_OP_GERMINATE: "germinate",
    enums.SEED_OP_FOSSILIZE: "fossilize",
    enums.SEED_OP_CULL: "cull",
}


def decide_epoch(history: RunHistory, state: SystemStatePacket) -> tuple[RunHistory, AdaptationCommand | None]:
    """Returns the history after an epoch, and the most urgent decision; None means no change."""
    history = history.with_epoch(state)
    decision = _verdict_on_probation(history, state) or _lower_rates(history) or _germination(history, state)
    if decision is None:
        return history, None
    operation = decision.seed_operation
    rates = decision.command_type == enums.COMMAND_OPTIMIZER
    kind: Decision = "optimizer" if rates else _DECISIONS[operation.operation]
    return history.with_decision(kind, operation.blueprint_id), decision


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
        if harmless and not _has_room(state, FOSSILIZED_LEFT):
            harmless, reason = False, f"no further seed may become a part of the host; {reason}"
        operation = enums.SEED_OP_FOSSILIZE if harmless else enums.SEED_OP_CULL
        return _seed_operation(operation, reason, seed_id=trial.seed_id)
    return None


def _lower_rates(history: RunHistory) -> AdaptationCommand | None:
    """Halves the rates for some epochs when the loss jumps by a good part of what training has gained so far."""
    if len(history.rate_changes) >= LR_CHANGES_MAX or _recently(history, "optimizer"):
        return None
    latest = history.records[-VOLATILE_EPOCHS - 1 :]
    losses = [record.training_loss for record in latest]
    best = min(finite(record.training_loss for record in history.records), default=math.nan)
    least_rise = VOLATILE_SHARE * (history.first_loss - best)
    rises = [(after - before, VOLATILE_RISE * abs(before)) for before, after in pairwise(losses)]
    jumps = sum(rise > relative and rise > least_rise for rise, relative in rises)
    if jumps < VOLATILE_JUMPS:
        return None
    reason = f"training loss rose by over {VOLATILE_RISE:.0%} in {jumps} of the latest {len(losses) - 1} epochs"
    decision = AdaptationCommand(command_type=enums.COMMAND_OPTIMIZER, annotations={"reason": reason})
    steps = LR_EPOCHS * _steps_per_epoch(latest)
    decision.optimizer_adjustment.hyperparameters.update({"lr_factor": LR_FACTOR, "lr_expires_after_steps": steps})
    return decision


def _germination(history: RunHistory, state: SystemStatePacket) -> AdaptationCommand | None:
    """Grows the model on a plateau, while it has room and its last seeds brought something."""
    active = [seed for seed in state.seed_states if seed.stage in GROWING]
    if len(active) >= ACTIVE_MAX or any(seed.age_epochs < YOUNG_EPOCHS for seed in active):
        return None
    last = history.outcomes[-GAINLESS_MAX:]
    if len(last) == GAINLESS_MAX and not any(outcome.gained for outcome in last):
        return None
    if not (_has_room(state, SLOTS_FREE) and _has_room(state, FOSSILIZED_LEFT)):
        return None
    # The latest germination counts as well: its seed may not be reported yet.
    past = [(record.epoch, record.blueprint) for record in history.records if record.decision == "germinate"]
    young = past and state.current_epoch - past[-1][0] < YOUNG_EPOCHS
    if young or not _plateau(history.records):
        return None
    turn = BLUEPRINTS.index(past[-1][1]) + 1 if past else len(history.outcomes)
    best = min(finite(record.validation_loss for record in history.records))
    reason = f"no real improvement for {PLATEAU_EPOCHS} epochs; best validation loss {best:.4g}"
    return _seed_operation(enums.SEED_OP_GERMINATE, reason, blueprint_id=BLUEPRINTS[turn % len(BLUEPRINTS)])


def _has_room(state: SystemStatePacket, metric: str) -> bool:
    """Returns whether the packet allows one more; a packet without the metric sets no limit."""
    return state.training_metrics.get(metric, 1.0) >= 1.0


def _plateau(records: tuple[EpochRecord, ...]) -> bool:
    """Returns whether the best validation loss of the latest epochs does not improve on the best before them."""
    recent = finite(record.validation_loss for record in records[-PLATEAU_EPOCHS:])
    before = finite(record.validation_loss for record in records[:-PLATEAU_EPOCHS])
    if not before or len(recent) < PLATEAU_EPOCHS:
        return False
    return min(recent) > min(before) - PLATEAU_MARGIN * abs(min(before))


def _recently(history: RunHistory, decision: Decision) -> bool:
    decided = [record.epoch for record in history.records if record.decision == decision]
    return any(history.records[-1].epoch - epoch < PAUSE_EPOCHS for epoch in decided)


def _steps_per_epoch(records: tuple[EpochRecord, ...]) -> int:
    return max(1, (records[-1].step - records[0].step) // max(1, records[-1].epoch - records[0].epoch))


def _seed_operation(
    operation: Operation, reason: str, *, seed_id: str = "", blueprint_id: str = ""
) -> AdaptationCommand:
    return AdaptationCommand(
        command_type=enums.COMMAND_SEED,
        target_seed_id=seed_id,
        seed_operation=CommandSeedOperation(operation=operation, blueprint_id=blueprint_id),
        annotations={"reason": reason},
    )
