"""What the event loop can ask of the lane at a fence: small values in, results out. Tensors cross as images only.

Owns how each command is carried out on the rig. Must not know who asked, or when a fence comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from leyline.v1.seeds_pb2 import SeedState
from tolaria.errors import TolariaError
from tolaria.images.image import StateImage
from tolaria.optimization import change_hyperparameters
from tolaria.rollback.orders import RestoreOrder
from tolaria.training.growth import SeedsReport
from tolaria.training.recovery.keeper import Kept, Restored, SnapshotKeeper
from tolaria.training.rig import Rig
from tolaria.values.optimization import ActiveAdjustment, Adjustment
from tolaria.values.profiling import TraceFailed


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


@dataclass(frozen=True, slots=True)
class Restore:
    """Go back: to the image of a checkpoint, or, where there is none, to the snapshot of the order's step."""

    order: RestoreOrder
    image: StateImage | None


@dataclass(frozen=True, slots=True)
class Keep:
    """Have an image of the state as it is at the fence."""


@dataclass(frozen=True, slots=True)
class LeaveOut:
    """From now on pass over these batches: (epoch, place in the epoch)."""

    batches: frozenset[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class CaptureProfile:
    """Profile the next steps; a ProfileEnded tells of the trace. Nothing for the rig: the lane does it itself."""

    steps: int


FenceCommand = Reconcile | ChangeOptimizer | Restore | Keep | LeaveOut
LaneCommand = FenceCommand | CaptureProfile

URGENT = (Restore,)
"""For these an unfinished update is given up."""


@dataclass(frozen=True, slots=True)
class OptimizerChanged:
    """Learning rates by group, before and after, and what else was changed, in words."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    hyperparameters: tuple[str, ...]
    living: tuple[ActiveAdjustment, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchesLeftOut:
    """How many batches are left out by now, in all epochs."""

    count: int


@dataclass(frozen=True, slots=True)
class ProfileBegun:
    """A window of so many steps is open."""

    steps: int


FenceResult = SeedsReport | OptimizerChanged | Restored | Kept | BatchesLeftOut | ProfileBegun | TraceFailed


@dataclass(frozen=True, slots=True)
class FenceReport:
    """A command has been carried out, or refused with `error`; nothing has changed then. `ticket` is the asker's."""

    ticket: int
    global_step: int
    result: FenceResult | None
    error: TolariaError | None


def carry_out(rig: Rig, keeper: SnapshotKeeper, ticket: int, command: FenceCommand) -> FenceReport:
    """Carry a command out between two updates."""
    try:
        result = _result(rig, keeper, command)
        return FenceReport(ticket, rig.global_step, result, None)
    except TolariaError as error:
        return FenceReport(ticket, rig.global_step, None, error)


def _result(rig: Rig, keeper: SnapshotKeeper, command: FenceCommand) -> FenceResult:
    match command:
        case Reconcile(desired):
            report = rig.growth.reconcile(desired, rig.global_step)
            rig.grew()
            return report
        case ChangeOptimizer(adjustment, hyperparameters, group):
            return _changed(rig, adjustment, hyperparameters, group)
        case Restore(order, image):
            return keeper.restore(order, image)
        case Keep():
            return keeper.keep()
        case LeaveOut(batches):
            rig.left_out.batches |= batches
            return BatchesLeftOut(len(rig.left_out.batches))
        case _:
            assert_never(command)


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
