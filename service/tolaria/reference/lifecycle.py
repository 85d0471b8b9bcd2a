"""The lifecycle of a seed: stage transitions, operations and gates, as tables and pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from leyline.v1 import enums_pb2 as enums
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.errors import IllegalMoveError
from tolaria.values.seeds import FOSSILIZED_LEFT, GROWING, Stage

Gate: TypeAlias = "enums.SeedLifecycleGate.ValueType"
Operation: TypeAlias = "enums.SeedOperation.ValueType"

BLUEPRINTS = ("residual_mlp", "bottleneck_adapter", "depthwise_conv_adapter", "lora")
"""Blueprints that G0 accepts: those built into Tolaria."""

# Thresholds of the gates. Epochs are those of the training run.
GRADIENT_NORM_MIN = 1e-8  # passes G1; smaller float32 updates are lost in rounding
STABLE_EPOCHS = 2  # of stable loss that G2 requires; a single epoch can be chance
STABLE_RISE_MAX = 0.1  # relative rise over the lowest loss that counts as stable; the noise of an epoch
PROBATION_EPOCHS = 3  # at full strength before G4 can open; shows a lasting effect
ACCURACY_DROP_MAX = 0.01  # validation accuracy (0 to 1) that a seed may cost; the noise of small data sets
EMBARGO_EPOCHS = 2  # between culling and the reset at G5; the host recovers before its slot is used again

# (Stage, next stage) -> the gate that guards the transition; None for no gate.
TRANSITIONS: Mapping[tuple[Stage, Stage], Gate | None] = {
    (enums.SEED_STAGE_DORMANT, enums.SEED_STAGE_GERMINATED): enums.SEED_GATE_G0_SANITY,
    (enums.SEED_STAGE_GERMINATED, enums.SEED_STAGE_TRAINING): None,
    (enums.SEED_STAGE_TRAINING, enums.SEED_STAGE_BLENDING): enums.SEED_GATE_G1_GRADIENT_HEALTH,
    (enums.SEED_STAGE_BLENDING, enums.SEED_STAGE_SHADOWING): enums.SEED_GATE_G2_STABILITY,
    (enums.SEED_STAGE_SHADOWING, enums.SEED_STAGE_PROBATIONARY): enums.SEED_GATE_G3_INTERFACE,
    (enums.SEED_STAGE_PROBATIONARY, enums.SEED_STAGE_PROBATIONARY): None,  # fine-tuning restarts the probation
    (enums.SEED_STAGE_PROBATIONARY, enums.SEED_STAGE_FOSSILIZED): enums.SEED_GATE_G4_SYSTEM_IMPACT,
    (enums.SEED_STAGE_FOSSILIZED, enums.SEED_STAGE_TERMINATED): None,
    **dict.fromkeys(((stage, enums.SEED_STAGE_CULLED) for stage in GROWING), None),
    (enums.SEED_STAGE_CULLED, enums.SEED_STAGE_EMBARGOED): None,
    (enums.SEED_STAGE_EMBARGOED, enums.SEED_STAGE_RESETTING): enums.SEED_GATE_G5_RESET,
    (enums.SEED_STAGE_RESETTING, enums.SEED_STAGE_DORMANT): None,
}

# (Operation, stage of the seed) -> the stage that the operation leads to.
OPERATIONS: Mapping[tuple[Operation, Stage], Stage] = {
    (enums.SEED_OP_GERMINATE, enums.SEED_STAGE_DORMANT): enums.SEED_STAGE_GERMINATED,
    (enums.SEED_OP_START_TRAINING, enums.SEED_STAGE_GERMINATED): enums.SEED_STAGE_TRAINING,
    (enums.SEED_OP_START_GRAFTING, enums.SEED_STAGE_TRAINING): enums.SEED_STAGE_BLENDING,
    (enums.SEED_OP_STABILIZE, enums.SEED_STAGE_BLENDING): enums.SEED_STAGE_SHADOWING,
    (enums.SEED_OP_EVALUATE, enums.SEED_STAGE_SHADOWING): enums.SEED_STAGE_PROBATIONARY,
    (enums.SEED_OP_FINE_TUNE, enums.SEED_STAGE_PROBATIONARY): enums.SEED_STAGE_PROBATIONARY,
    (enums.SEED_OP_FOSSILIZE, enums.SEED_STAGE_PROBATIONARY): enums.SEED_STAGE_FOSSILIZED,
    **dict.fromkeys(((enums.SEED_OP_CULL, stage) for stage in GROWING), enums.SEED_STAGE_CULLED),
    # Withdraws a seed that has not affected the host's output yet, or terminates one that is part of the host.
    (enums.SEED_OP_CANCEL, enums.SEED_STAGE_GERMINATED): enums.SEED_STAGE_CULLED,
    (enums.SEED_OP_CANCEL, enums.SEED_STAGE_TRAINING): enums.SEED_STAGE_CULLED,
    (enums.SEED_OP_CANCEL, enums.SEED_STAGE_FOSSILIZED): enums.SEED_STAGE_TERMINATED,
}

# Transitions that happen without a command once the gate is open. Leaving the probation takes a command.
AUTOMATIC: Mapping[Stage, Stage] = {
    enums.SEED_STAGE_GERMINATED: enums.SEED_STAGE_TRAINING,
    enums.SEED_STAGE_TRAINING: enums.SEED_STAGE_BLENDING,
    enums.SEED_STAGE_BLENDING: enums.SEED_STAGE_SHADOWING,
    enums.SEED_STAGE_SHADOWING: enums.SEED_STAGE_PROBATIONARY,
    enums.SEED_STAGE_CULLED: enums.SEED_STAGE_EMBARGOED,
    enums.SEED_STAGE_EMBARGOED: enums.SEED_STAGE_RESETTING,
    enums.SEED_STAGE_RESETTING: enums.SEED_STAGE_DORMANT,
}


@dataclass(frozen=True, slots=True)
class Seed:
    """One desired seed. Epochs are those of the training run; `losses` are those since it entered its stage."""

    seed_id: str
    blueprint_id: str
    slot: str
    stage: Stage
    blending_steps: int
    germinated_epoch: int = 0
    entered_epoch: int = 0
    alpha: AlphaSchedule | None = None
    accuracy_before: float = math.nan
    losses: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Observation:
    """The state of the run as a seed's gates see it. `reported` is None if the packet does not contain the seed."""

    state: SystemStatePacket
    reported: SeedState | None
    slot_free: bool


def closed_reason(target: Stage, seed: Seed, seen: Observation) -> str | None:
    """Returns why the gate from the seed's stage to `target` is closed; None if it is open or there is no gate.

    Raises `IllegalMoveError` when `target` may not follow the seed's stage.
    """
    if (seed.stage, target) not in TRANSITIONS:
        raise IllegalMoveError(f"a seed in stage {stage_name(seed.stage)} cannot go to {stage_name(target)}")
    gate = TRANSITIONS[seed.stage, target]
    return None if gate is None else _GATES[gate](seed, seen)


def target_of(operation: Operation, stage: Stage) -> Stage:
    """Returns the stage that `operation` leads to. Raises `IllegalMoveError` when it is not allowed in `stage`."""
    if (operation, stage) not in OPERATIONS:
        raise IllegalMoveError(f"{operation_name(operation)} does not fit a seed in stage {stage_name(stage)}")
    return OPERATIONS[operation, stage]


def stage_name(stage: int) -> str:
    """Returns `germinated` for SEED_STAGE_GERMINATED; numbers that the contract lacks are returned as digits."""
    known = stage in enums.SeedLifecycleStage.values()
    return enums.SeedLifecycleStage.Name(stage).removeprefix("SEED_STAGE_").lower() if known else str(stage)  # type: ignore[arg-type]


def operation_name(operation: int) -> str:
    """Returns the contract's name of an operation, or `operation N` for a number that it lacks."""
    known = operation in enums.SeedOperation.values()
    return enums.SeedOperation.Name(operation) if known else f"operation {operation}"  # type: ignore[arg-type]


def loss_of(reported: SeedState | None, state: SystemStatePacket) -> float:
    """Returns the seed's own loss if it is reported, else the host's validation loss."""
    if reported is not None and "loss" in reported.metrics:
        return reported.metrics["loss"]
    return state.validation_loss


def epochs_in_stage(seed: Seed, state: SystemStatePacket) -> int:
    """Returns the number of epochs since the seed entered its stage."""
    return max(0, state.current_epoch - seed.entered_epoch)


def _sanity(seed: Seed, seen: Observation) -> str | None:
    if seed.blueprint_id not in BLUEPRINTS:
        return f"G0: blueprint {seed.blueprint_id!r} is unknown; known are {', '.join(BLUEPRINTS)}"
    return None if seen.slot_free else "G0: the slot is taken"


def _gradient_health(_seed: Seed, seen: Observation) -> str | None:
    if seen.reported is None:
        return "G1: no gradient norm of the seed is reported"
    norm = seen.reported.gradient_norm
    if not math.isfinite(norm):
        return f"G1: the gradient norm is {norm}"
    return None if norm >= GRADIENT_NORM_MIN else f"G1: the gradient norm {norm:g} has vanished"


def _stability(seed: Seed, _seen: Observation) -> str | None:
    window = seed.losses[-STABLE_EPOCHS:]
    if len(window) < STABLE_EPOCHS:
        return f"G2: {len(window)} of {STABLE_EPOCHS} epochs watched"
    if not all(map(math.isfinite, window)):
        return "G2: a loss is not finite"
    lowest = accumulate(window, min)
    rises = (loss - low > STABLE_RISE_MAX * abs(low) for loss, low in zip(window, lowest, strict=True))
    return "G2: the loss rises" if any(rises) else None


def _interface(seed: Seed, seen: Observation) -> str | None:
    if seed.alpha is None:
        return "G3: there is no alpha schedule"
    end = seed.alpha.begin_step + seed.alpha.duration_steps
    return None if seen.state.global_step >= end else f"G3: alpha reaches its end at step {end}"


def _system_impact(seed: Seed, seen: Observation) -> str | None:
    if seen.state.training_metrics.get(FOSSILIZED_LEFT, 1.0) < 1.0:
        return "G4: no further seed may become a part of the host"
    epochs = epochs_in_stage(seed, seen.state)
    if epochs < PROBATION_EPOCHS:
        return f"G4: {epochs} of {PROBATION_EPOCHS} epochs on probation"
    after, before = seen.state.validation_accuracy, seed.accuracy_before
    if not math.isfinite(before) or not math.isfinite(after):
        return "G4: the validation accuracy before or after is not known"
    dropped = after < before - ACCURACY_DROP_MAX
    return f"G4: accuracy fell from {before:.4f} to {after:.4f}" if dropped else None


def _reset(seed: Seed, seen: Observation) -> str | None:
    left = EMBARGO_EPOCHS - epochs_in_stage(seed, seen.state)
    return None if left <= 0 else f"G5: {left} epochs of embargo left"


_GATES: Mapping[Gate, Callable[[Seed, Observation], str | None]] = {
    enums.SEED_GATE_G0_SANITY: _sanity,
    enums.SEED_GATE_G1_GRADIENT_HEALTH: _gradient_health,
    enums.SEED_GATE_G2_STABILITY: _stability,
    enums.SEED_GATE_G3_INTERFACE: _interface,
    enums.SEED_GATE_G4_SYSTEM_IMPACT: _system_impact,
    enums.SEED_GATE_G5_RESET: _reset,
}
