"""Whether a gate of a seed's life is open: pure judgements of facts.

Owns the settings of the lifecycle. Must not know the tables of moves, nor who asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from leyline.v1.enums_pb2 import (
    SEED_GATE_G0_SANITY,
    SEED_GATE_G1_GRADIENT_HEALTH,
    SEED_GATE_G2_STABILITY,
    SEED_GATE_G3_INTERFACE,
    SEED_GATE_G4_SYSTEM_IMPACT,
    SEED_GATE_G5_RESET,
)
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.reference.lifecycle import Gate

BLUEPRINTS = ("residual_mlp", "bottleneck_adapter", "depthwise_conv_adapter", "lora")


@dataclass(frozen=True, slots=True)
class LifecycleSettings:
    """How patient Kasmina is. Epochs and steps are the training's own."""

    blueprints: tuple[str, ...] = BLUEPRINTS
    """Blueprints that G0 lets in. Those that Tolaria builds in."""

    gradient_norm_min: float = 1e-8
    """Least gradient norm of a seed at G1. 1e-8: below it float32 updates are lost in rounding."""

    stable_epochs: int = 2
    """Epochs that the loss must have held still at G2. 2: one epoch can be luck."""

    stable_rise_max: float = 0.1
    """Greatest relative rise of the loss over its least value that still counts as still. 0.1: noise of an epoch."""

    blending_steps: int = 200
    """Steps from alpha 0 to alpha 1, unless the command names another number. 200: a few epochs of a small job."""

    probation_epochs: int = 3
    """Epochs at full strength before G4 can open. 3: an effect that lasts."""

    accuracy_drop_max: float = 0.01
    """Validation accuracy (0 to 1) that a seed may cost against before its blending. 0.01: noise of small sets."""

    embargo_epochs: int = 2
    """Epochs between a culling and the reset at G5. 2: the host settles before the place is used again."""

    patience_epochs: int = 12
    """Epochs in one living stage after which a seed is given up. 12: twice what a healthy seed needs in any of them."""

    living_max: int = 4
    """Seeds that live at once. 4: their rows of the gradient matrix stay cheap."""

    seeds_max: int = 64
    """Seeds remembered in all, fossilized ones among them. 64: bounds every answer to some kilobytes."""

    dormant_max: int = 4
    """Seeds at rest that are remembered for another life, the oldest forgotten first. 4: nobody waits for more."""


@dataclass(frozen=True, slots=True)
class GateFacts:
    """What is known of one seed at one fence. `reported` is None where Tolaria does not report the seed."""

    state: SystemStatePacket
    reported: SeedState | None
    blueprint_id: str
    slot_free: bool
    epochs_in_stage: int
    losses: tuple[float, ...]
    alpha: AlphaSchedule | None
    accuracy_before: float | None


def obstacle(gate: Gate | None, facts: GateFacts, settings: LifecycleSettings) -> str | None:
    """Why `gate` is shut, in words; None when it is open (or there is none)."""
    return None if gate is None else _JUDGES[gate](facts, settings)


def alpha_at(schedule: AlphaSchedule, step: int) -> float:
    """Blending strength at a global step: linear between the schedule's ends, constant outside (the contract)."""
    if step < schedule.begin_step:
        return schedule.start
    if step >= schedule.begin_step + schedule.duration_steps:
        return schedule.end
    done = (step - schedule.begin_step) / schedule.duration_steps
    return schedule.start + (schedule.end - schedule.start) * done


def loss_of(reported: SeedState | None, state: SystemStatePacket) -> float:
    """The seed's own loss where Tolaria reports one, else the host's validation loss."""
    if reported is not None and "loss" in reported.metrics:
        return reported.metrics["loss"]
    return state.validation_loss


def _sanity(facts: GateFacts, settings: LifecycleSettings) -> str | None:
    if facts.blueprint_id not in settings.blueprints:
        return f"G0: blueprint {facts.blueprint_id!r} is unknown; known are {', '.join(settings.blueprints)}"
    return None if facts.slot_free else "G0: the slot is taken"


def _gradient_health(facts: GateFacts, settings: LifecycleSettings) -> str | None:
    if facts.reported is None:
        return "G1: no gradient norm of the seed is reported"
    norm = facts.reported.gradient_norm
    if not math.isfinite(norm):
        return f"G1: the gradient norm is {norm}"
    return None if norm >= settings.gradient_norm_min else f"G1: the gradient norm {norm:g} has vanished"


def _stability(facts: GateFacts, settings: LifecycleSettings) -> str | None:
    window = facts.losses[-settings.stable_epochs :]
    if len(window) < settings.stable_epochs:
        return f"G2: {len(window)} of {settings.stable_epochs} epochs watched"
    if not all(map(math.isfinite, window)):
        return "G2: a loss is not finite"
    least_so_far = accumulate(window, min)
    rises = (
        loss - least > settings.stable_rise_max * abs(least) for loss, least in zip(window, least_so_far, strict=True)
    )
    return "G2: the loss rises" if any(rises) else None


def _interface(facts: GateFacts, settings: LifecycleSettings) -> str | None:
    del settings
    if facts.alpha is None:
        return "G3: there is no alpha schedule"
    end = facts.alpha.begin_step + facts.alpha.duration_steps
    step = facts.state.global_step
    return None if step >= end else f"G3: alpha is {alpha_at(facts.alpha, step):.2f} and reaches its end at step {end}"


def _system_impact(facts: GateFacts, settings: LifecycleSettings) -> str | None:
    if facts.epochs_in_stage < settings.probation_epochs:
        return f"G4: {facts.epochs_in_stage} of {settings.probation_epochs} epochs on probation"
    after, before = facts.state.validation_accuracy, facts.accuracy_before
    if before is None or not math.isfinite(after):
        return "G4: the validation accuracy before or after is not known"
    return (
        None if after >= before - settings.accuracy_drop_max else f"G4: accuracy fell from {before:.4f} to {after:.4f}"
    )


def _reset(facts: GateFacts, settings: LifecycleSettings) -> str | None:
    left = settings.embargo_epochs - facts.epochs_in_stage
    return None if left <= 0 else f"G5: {left} epochs of embargo left"


_JUDGES: Mapping[Gate, Callable[[GateFacts, LifecycleSettings], str | None]] = {
    SEED_GATE_G0_SANITY: _sanity,
    SEED_GATE_G1_GRADIENT_HEALTH: _gradient_health,
    SEED_GATE_G2_STABILITY: _stability,
    SEED_GATE_G3_INTERFACE: _interface,
    SEED_GATE_G4_SYSTEM_IMPACT: _system_impact,
    SEED_GATE_G5_RESET: _reset,
}
