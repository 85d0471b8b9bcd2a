"""What the reference Tamiyo decides: pure judgements of a run's memory and its newest state.

Owns the rules and their settings. Must not know commands, clocks or sockets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.reference.decisions import Cull, Decision, Fossilize, Germinate, Retreat, ScaleLearningRate
from tolaria.reference.gates import BLUEPRINTS
from tolaria.reference.lifecycle import LIVING
from tolaria.reference.memory import EpochRecord, RunMemory


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """When Tamiyo acts. Epochs are the training's own; losses are compared by ratio, so their scale is free."""

    blueprints: tuple[str, ...] = BLUEPRINTS
    """Blueprints that it takes turns with. Those that Tolaria builds in."""

    plateau_epochs: int = 3
    """Epochs without an improvement that make a plateau. 3: the demo shows one within its minute."""

    plateau_margin: float = 0.02
    """Relative improvement of the validation loss below which it is none. 0.02: under the noise of an epoch."""

    living_max: int = 2
    """Seeds that live at once. 2: the effect of each can still be told."""

    young_epochs: int = 4
    """Age under which a seed is young, so that no other is germinated. 4: it has begun to learn."""

    volatile_epochs: int = 5
    """Epoch-to-epoch changes of the training loss that are looked at. 5: long enough to tell a habit from a slip."""

    volatile_rise: float = 0.2
    """Relative rise of the training loss that counts as a jump. 0.2: training losses fall, but for noise."""

    volatile_jumps: int = 2
    """Jumps among them that make a loss volatile. 2: one can be a hard batch."""

    lr_factor: float = 0.5
    """What a volatile loss multiplies the learning rates with. 0.5: the customary halving."""

    lr_changes_max: int = 3
    """Changes of the learning rates in one run. 3: what an eighth of the rate does not calm is noise."""

    divergence_ratio: float = 3.0
    """Training loss over its best that is divergence. 3: no epoch's noise is that large."""

    divergence_share: float = 0.25
    """Share of what training had gained that must be lost too. 0.25: tiny losses triple without any harm."""

    pause_epochs: int = 5
    """Epochs between two retreats, or between two changes of the learning rate. 5: the first must show its effect."""

    probation_epochs: int = 3
    """Epochs on probation before a seed is judged. 3: as long as Kasmina's gate asks for."""

    accuracy_drop_max: float = 0.005
    """Validation accuracy (0 to 1) that a seed may cost. 0.005: stricter than Kasmina's gate, so it never refuses."""


def decide_epoch(
    memory: RunMemory, state: SystemStatePacket, settings: PolicySettings
) -> tuple[RunMemory, Decision | None]:
    """The memory after an epoch, and the one thing to do about it: the most urgent first, or nothing."""
    memory = memory.with_epoch(state)
    decision = (
        _retreat_of_epoch(memory, state, settings)
        or _verdict_on_probation(memory, state, settings)
        or _calmer(memory, settings)
        or _germination(memory, state, settings)
    )
    return memory.with_decision(decision), decision


def decide_step(
    memory: RunMemory, state: SystemStatePacket, settings: PolicySettings
) -> tuple[RunMemory, Decision | None]:
    """Between epochs only divergence counts, and once. One batch is noise: the loss's EWMA is judged."""
    memory = memory.rewound(state.global_step)
    if memory.retreat_asked_step is not None and memory.retreat_asked_step <= state.global_step:
        return memory, None
    decision = _divergence(memory, state.training_loss, settings) if not math.isfinite(state.training_loss) else None
    if decision is None and "loss_ewma" in state.training_metrics:
        decision = _divergence(memory, state.training_metrics["loss_ewma"], settings)
    return replace(memory, retreat_asked_step=state.global_step if decision else None), decision


def _retreat_of_epoch(memory: RunMemory, state: SystemStatePacket, settings: PolicySettings) -> Decision | None:
    return None if _recently(memory, Retreat, settings) else _divergence(memory, state.training_loss, settings)


def _divergence(memory: RunMemory, loss: float, settings: PolicySettings) -> Retreat | None:
    if not math.isfinite(loss):
        return Retreat(f"training loss is {loss}")
    best = min((r.training_loss for r in memory.records if math.isfinite(r.training_loss)), default=math.nan)
    # Ratios mean something for positive losses only. NaN, where nothing is recorded, compares false.
    far = best > 0.0 and loss > settings.divergence_ratio * best
    if far and loss - best > settings.divergence_share * (memory.first_loss - best):
        return Retreat(f"training loss {loss:.4g} is {loss / best:.1f} times its best {best:.4g}")
    return None


def _verdict_on_probation(memory: RunMemory, state: SystemStatePacket, settings: PolicySettings) -> Decision | None:
    """The verdict on the first seed whose probation is over; none from an accuracy that is no number."""
    if not math.isfinite(state.validation_accuracy):
        return None
    for note in memory.notes:
        if note.probation_epoch is None or state.current_epoch - note.probation_epoch < settings.probation_epochs:
            continue
        harmless = state.validation_accuracy >= note.accuracy_before - settings.accuracy_drop_max
        verdict = Fossilize if harmless else Cull
        return verdict(note.seed_id, _before_and_after(note.accuracy_before, state.validation_accuracy))
    return None


def _before_and_after(before: float, after: float) -> str:
    known = f"{before:.2%} before it blended" if math.isfinite(before) else "unknown before it blended"
    return f"validation accuracy is {after:.2%} after its probation, was {known}"


def _calmer(memory: RunMemory, settings: PolicySettings) -> Decision | None:
    if len(memory.rate_changes) >= settings.lr_changes_max:
        return None
    losses = [record.training_loss for record in memory.records[-settings.volatile_epochs - 1 :]]
    jumps = sum(after - before > settings.volatile_rise * abs(before) for before, after in pairwise(losses))
    if jumps < settings.volatile_jumps or _recently(memory, ScaleLearningRate, settings):
        return None
    reason = (
        f"training loss rose by over {settings.volatile_rise:.0%} in {jumps} of the latest {len(losses) - 1} epochs"
    )
    return ScaleLearningRate(settings.lr_factor, reason)


def _germination(memory: RunMemory, state: SystemStatePacket, settings: PolicySettings) -> Decision | None:
    living = [seed for seed in state.seed_states if seed.stage in LIVING]
    if len(living) >= settings.living_max or any(seed.age_epochs < settings.young_epochs for seed in living):
        return None
    past = [record for record in memory.records if isinstance(record.decision, Germinate)]
    # Counted by its own germinations too: a seed that is not reported yet is as young as can be.
    if past and state.current_epoch - past[-1].epoch < settings.young_epochs:
        return None
    if not _plateau(memory.records, settings):
        return None
    last = past[-1].decision if past else None
    turn = settings.blueprints.index(last.blueprint_id) + 1 if isinstance(last, Germinate) else 0
    best = min(r.validation_loss for r in memory.records if math.isfinite(r.validation_loss))
    reason = f"no real improvement for {settings.plateau_epochs} epochs; best validation loss {best:.4g}"
    return Germinate(settings.blueprints[turn % len(settings.blueprints)], reason)


def _plateau(records: tuple[EpochRecord, ...], settings: PolicySettings) -> bool:
    """Whether the best validation loss of the latest epochs is no real improvement on the best before them."""
    recent = [r.validation_loss for r in records[-settings.plateau_epochs :] if math.isfinite(r.validation_loss)]
    before = [r.validation_loss for r in records[: -settings.plateau_epochs] if math.isfinite(r.validation_loss)]
    if not before or len(recent) < settings.plateau_epochs:
        return False
    return min(recent) > min(before) - settings.plateau_margin * abs(min(before))


def _recently(memory: RunMemory, kind: type[Retreat | ScaleLearningRate], settings: PolicySettings) -> bool:
    newest = memory.records[-1].epoch
    return any(isinstance(r.decision, kind) and newest - r.epoch < settings.pause_epochs for r in memory.records)
