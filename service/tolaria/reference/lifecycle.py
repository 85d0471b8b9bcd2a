"""The life of a seed: stage transitions, operations and gates, as tables and pure functions."""

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

Stage: TypeAlias = "enums.SeedLifecycleStage.ValueType"
Gate: TypeAlias = "enums.SeedLifecycleGate.ValueType"
Operation: TypeAlias = "enums.SeedOperation.ValueType"

BLUEPRINTS = ("residual_mlp", "bottleneck_adapter", "depthwise_conv_adapter", "lora")

# Stage -> the stages that may follow, each with the gate that guards the transition (None: no gate).
TRANSITIONS: Mapping[Stage, Mapping[Stage, Gate | None]] = {
    enums.SEED_STAGE_UNKNOWN: {},
    enums.SEED_STAGE_DORMANT: {enums.SEED_STAGE_GERMINATED: enums.SEED_GATE_G0_SANITY},
    enums.SEED_STAGE_GERMINATED: {enums.SEED_STAGE_TRAINING: None, enums.SEED_STAGE_CULLED: None},
    enums.SEED_STAGE_TRAINING: {
        enums.SEED_STAGE_BLENDING: enums.SEED_GATE_G1_GRADIENT_HEALTH,
        enums.SEED_STAGE_CULLED: None,
    },
    enums.SEED_STAGE_BLENDING: {
        enums.SEED_STAGE_SHADOWING: enums.SEED_GATE_G2_STABILITY,
        enums.SEED_STAGE_CULLED: None,
    },
    enums.SEED_STAGE_SHADOWING: {
        enums.SEED_STAGE_PROBATIONARY: enums.SEED_GATE_G3_INTERFACE,
        enums.SEED_STAGE_CULLED: None,
    },
    enums.SEED_STAGE_PROBATIONARY: {
        enums.SEED_STAGE_PROBATIONARY: None,  # fine-tuning restarts the probation
        enums.SEED_STAGE_FOSSILIZED: enums.SEED_GATE_G4_SYSTEM_IMPACT,
        enums.SEED_STAGE_CULLED: None,
    },
    enums.SEED_STAGE_FOSSILIZED: {enums.SEED_STAGE_TERMINATED: None},
    enums.SEED_STAGE_CULLED: {enums.SEED_STAGE_EMBARGOED: None},
    enums.SEED_STAGE_EMBARGOED: {enums.SEED_STAGE_RESETTING: enums.SEED_GATE_G5_RESET},
    enums.SEED_STAGE_RESETTING: {enums.SEED_STAGE_DORMANT: None},
    enums.SEED_STAGE_TERMINATED: {},
}

ACTIVE_STAGES: frozenset[Stage] = frozenset(
    stage for stage, targets in TRANSITIONS.items() if enums.SEED_STAGE_CULLED in targets
)

# Operation -> the stage it leads to, by the current stage of the seed.
OPERATIONS: Mapping[Operation, Mapping[Stage, Stage]] = {
    enums.SEED_OP_UNKNOWN: {},
    enums.SEED_OP_GERMINATE: {enums.SEED_STAGE_DORMANT: enums.SEED_STAGE_GERMINATED},
    enums.SEED_OP_START_TRAINING: {enums.SEED_STAGE_GERMINATED: enums.SEED_STAGE_TRAINING},
    enums.SEED_OP_START_GRAFTING: {enums.SEED_STAGE_TRAINING: enums.SEED_STAGE_BLENDING},
    enums.SEED_OP_STABILIZE: {enums.SEED_STAGE_BLENDING: enums.SEED_STAGE_SHADOWING},
    enums.SEED_OP_EVALUATE: {enums.SEED_STAGE_SHADOWING: enums.SEED_STAGE_PROBATIONARY},
    enums.SEED_OP_FINE_TUNE: {enums.SEED_STAGE_PROBATIONARY: enums.SEED_STAGE_PROBATIONARY},
    enums.SEED_OP_FOSSILIZE: {enums.SEED_STAGE_PROBATIONARY: enums.SEED_STAGE_FOSSILIZED},
    enums.SEED_OP_CULL: dict.fromkeys(ACTIVE_STAGES, enums.SEED_STAGE_CULLED),
    # Withdraws a seed that has not affected the host's output yet, or terminates one that is part of the host.
    enums.SEED_OP_CANCEL: {
        enums.SEED_STAGE_GERMINATED: enums.SEED_STAGE_CULLED,
        enums.SEED_STAGE_TRAINING: enums.SEED_STAGE_CULLED,
        enums.SEED_STAGE_FOSSILIZED: enums.SEED_STAGE_TERMINATED,
    },
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
class LifecycleSettings:
    """Thresholds of the gates and bounds of the set of seeds. Epochs and steps are those of the training run."""

    blueprints: tuple[str, ...] = BLUEPRINTS
    """Blueprints that G0 accepts: those built into Tolaria."""
    gradient_norm_min: float = 1e-8
    """Smallest gradient norm that passes G1. 1e-8: smaller float32 updates are lost in rounding."""
    stable_epochs: int = 2
    """Epochs of stable loss that G2 requires. 2: a single epoch can be chance."""
    stable_rise_max: float = 0.1
    """Largest relative rise over the lowest loss that counts as stable. 0.1: the noise of an epoch."""
    blending_steps: int = 200
    """Steps from alpha 0 to alpha 1 unless the command sets another number. 200: a few epochs of a small job."""
    probation_epochs: int = 3
    """Epochs at full strength before G4 can open. 3: shows a lasting effect."""
    accuracy_drop_max: float = 0.01
    """Validation accuracy (0 to 1) that a seed may cost since its blending. 0.01: the noise of small data sets."""
    embargo_epochs: int = 2
    """Epochs between culling and the reset at G5. 2: the host recovers before its slot is used again."""
    stage_epochs_max: int = 12
    """Epochs in one active stage after which a seed is culled. 12: twice what a healthy seed needs in any stage."""
    active_max: int = 4
    """Largest number of active seeds. 4: keeps the rows of the gradient matrix cheap."""
    seeds_max: int = 64
    """Largest number of seeds in all, fossilized ones included. 64: bounds each answer to some kilobytes."""
    dormant_max: int = 4
    """Largest number of dormant seeds; the oldest are forgotten first. 4: few are ever germinated again."""


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
    accuracy_before: float | None = None
    losses: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known about a seed beside its own record. `reported` is None if the packet does not contain the seed."""

    state: SystemStatePacket
    reported: SeedState | None
    slot_free: bool


def gate_between(source: Stage, target: Stage) -> Gate | None:
    """Returns the gate that guards a transition; None if it has none.

    Raises:
        IllegalMoveError: `target` may not follow `source`.
    """
    targets = TRANSITIONS.get(source, {})
    if target not in targets:
        raise IllegalMoveError(f"a seed in stage {stage_name(source)} cannot go to {stage_name(target)}")
    return targets[target]


def target_of(operation: Operation, stage: Stage) -> Stage:
    """Returns the stage that `operation` leads to from `stage`.

    Raises:
        IllegalMoveError: the operation is unknown or not allowed in this stage.
    """
    targets = OPERATIONS.get(operation, {})
    if stage not in targets:
        raise IllegalMoveError(f"{operation_name(operation)} does not fit a seed in stage {stage_name(stage)}")
    return targets[stage]


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


def closed_reason(gate: Gate | None, seed: Seed, seen: Observation, settings: LifecycleSettings) -> str | None:
    """Returns why `gate` is closed for the seed; None if it is open or there is no gate."""
    return None if gate is None else _GATES[gate](seed, seen, settings)


def epochs_in_stage(seed: Seed, state: SystemStatePacket) -> int:
    """Returns the number of epochs since the seed entered its stage."""
    return max(0, state.current_epoch - seed.entered_epoch)


def _sanity(seed: Seed, seen: Observation, settings: LifecycleSettings) -> str | None:
    if seed.blueprint_id not in settings.blueprints:
        return f"G0: blueprint {seed.blueprint_id!r} is unknown; known are {', '.join(settings.blueprints)}"
    return None if seen.slot_free else "G0: the slot is taken"


def _gradient_health(seed: Seed, seen: Observation, settings: LifecycleSettings) -> str | None:
    del seed
    if seen.reported is None:
        return "G1: no gradient norm of the seed is reported"
    norm = seen.reported.gradient_norm
    if not math.isfinite(norm):
        return f"G1: the gradient norm is {norm}"
    return None if norm >= settings.gradient_norm_min else f"G1: the gradient norm {norm:g} has vanished"


def _stability(seed: Seed, seen: Observation, settings: LifecycleSettings) -> str | None:
    del seen
    window = seed.losses[-settings.stable_epochs :]
    if len(window) < settings.stable_epochs:
        return f"G2: {len(window)} of {settings.stable_epochs} epochs watched"
    if not all(map(math.isfinite, window)):
        return "G2: a loss is not finite"
    lowest = accumulate(window, min)
    rises = (loss - low > settings.stable_rise_max * abs(low) for loss, low in zip(window, lowest, strict=True))
    return "G2: the loss rises" if any(rises) else None


def _interface(seed: Seed, seen: Observation, settings: LifecycleSettings) -> str | None:
    del settings
    if seed.alpha is None:
        return "G3: there is no alpha schedule"
    end = seed.alpha.begin_step + seed.alpha.duration_steps
    return None if seen.state.global_step >= end else f"G3: alpha reaches its end at step {end}"


def _system_impact(seed: Seed, seen: Observation, settings: LifecycleSettings) -> str | None:
    epochs = epochs_in_stage(seed, seen.state)
    if epochs < settings.probation_epochs:
        return f"G4: {epochs} of {settings.probation_epochs} epochs on probation"
    after, before = seen.state.validation_accuracy, seed.accuracy_before
    if before is None or not math.isfinite(after):
        return "G4: the validation accuracy before or after is not known"
    dropped = after < before - settings.accuracy_drop_max
    return f"G4: accuracy fell from {before:.4f} to {after:.4f}" if dropped else None


def _reset(seed: Seed, seen: Observation, settings: LifecycleSettings) -> str | None:
    left = settings.embargo_epochs - epochs_in_stage(seed, seen.state)
    return None if left <= 0 else f"G5: {left} epochs of embargo left"


_GATES: Mapping[Gate, Callable[[Seed, Observation, LifecycleSettings], str | None]] = {
    enums.SEED_GATE_G0_SANITY: _sanity,
    enums.SEED_GATE_G1_GRADIENT_HEALTH: _gradient_health,
    enums.SEED_GATE_G2_STABILITY: _stability,
    enums.SEED_GATE_G3_INTERFACE: _interface,
    enums.SEED_GATE_G4_SYSTEM_IMPACT: _system_impact,
    enums.SEED_GATE_G5_RESET: _reset,
}
