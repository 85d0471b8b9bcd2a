"""What the event loop can ask of the lane at a fence: small values in, results out. No tensor crosses.

Owns how each command is carried out on the rig. Must not know who asked, or when a fence comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leyline.v1.seeds_pb2 import SeedState
from tolaria.errors import TolariaError
from tolaria.optimization import Adjustment, change_hyperparameters
from tolaria.training.growth import SeedsReport
from tolaria.training.rig import Rig


@dataclass(frozen=True, slots=True)
class Reconcile:
    """Bring the model to the whole set of seeds that Kasmina desires."""

    desired: tuple[SeedState, ...]


@dataclass(frozen=True, slots=True)
class AdjustRate:
    """Change learning rates."""

    adjustment: Adjustment


@dataclass(frozen=True, slots=True)
class ChangeHyperparameters:
    """Set hyperparameters other than the learning rate. `group` None: all."""

    changes: Mapping[str, float]
    group: str | None


FenceCommand = Reconcile | AdjustRate | ChangeHyperparameters


@dataclass(frozen=True, slots=True)
class RatesChanged:
    """Learning rates by group, before and after."""

    before: Mapping[str, float]
    after: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class HyperparametersChanged:
    """What was changed, in words."""

    changes: tuple[str, ...]


FenceResult = SeedsReport | RatesChanged | HyperparametersChanged


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
        case AdjustRate(adjustment):
            record = rig.growth.controller.adjust(adjustment, at_step=rig.global_step)
            rig.growth.controller.apply(rig.global_step)
            return RatesChanged(record.before, record.after)
        case ChangeHyperparameters(changes, group):
            changed = change_hyperparameters(rig.growth.manager.optimizer, changes, group=group)
            return HyperparametersChanged(tuple(f"{c.group} {c.name}: {c.before:g} -> {c.after:g}" for c in changed))
