"""What the event loop can ask of the lane at a fence: small values in, results out. No tensor crosses.

Owns how each command is carried out on the rig. Must not know who asked, or when a fence comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leyline.v1.seeds_pb2 import SeedState
from tolaria.errors import TolariaError
from tolaria.optimization import Adjustment, LiveAdjustment, change_hyperparameters
from tolaria.training.growth import SeedsReport
from tolaria.training.rig import Rig


@dataclass(frozen=True, slots=True)
class Reconcile:
    """Bring the model to the whole set of seeds that Kasmina desires."""

    desired: tuple[SeedState, ...]


@dataclass(frozen=True, slots=True)
class ChangeOptimizer:
    """Change learning rates, or set other hyperparameters of a group (None: of all), or both: all of it or nothing."""

    adjustment: Adjustment | None
    hyperparameters: Mapping[str, float]
    group: str | None


FenceCommand = Reconcile | ChangeOptimizer


@dataclass(frozen=True, slots=True)
class OptimizerChanged:
    """Learning rates by group, before and after, and what else was changed, in words."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    hyperparameters: tuple[str, ...]
    living: tuple[LiveAdjustment, ...] = ()


FenceResult = SeedsReport | OptimizerChanged


@dataclass(frozen=True, slots=True)
class FenceReport:
    """A command has been carried out, or refused with `error`; nothing has changed then. `ticket` is the asker's."""

    ticket: int
    global_step: int
    result: FenceResult | None
    error: TolariaError | None


def carry_out(rig: Rig, ticket: int, command: FenceCommand) -> FenceReport:
    """Carry a command out between two updates."""
    try:
        return FenceReport(ticket, rig.global_step, _result(rig, command), None)
    except TolariaError as error:
        return FenceReport(ticket, rig.global_step, None, error)


def _result(rig: Rig, command: FenceCommand) -> FenceResult:
    match command:
        case Reconcile(desired):
            report = rig.growth.reconcile(desired, rig.global_step)
            rig.grew()
            return report
        case ChangeOptimizer(adjustment, hyperparameters, group):
            return _changed(rig, adjustment, hyperparameters, group)


def _changed(
    rig: Rig, adjustment: Adjustment | None, hyperparameters: Mapping[str, float], group: str | None
) -> OptimizerChanged:
    controller, step = rig.growth.controller, rig.global_step
    kept = controller.state_dict()
    record = None if adjustment is None else controller.adjust(adjustment, at_step=step)
    try:
        changes = change_hyperparameters(rig.optimizer, hyperparameters, group=group) if hyperparameters else []
    except TolariaError:
        controller.load_state_dict(kept)
        raise
    controller.apply(step)
    words = tuple(f"{change.group} {change.name}: {change.before:g} -> {change.after:g}" for change in changes)
    before, after = (record.before, record.after) if record else ({}, {})
    return OptimizerChanged(before, after, words, controller.living)
