"""Errors of jobs, gradients, optimizers, seeds and the lane."""

from __future__ import annotations

from collections.abc import Sequence

from tolaria.errors.base import TolariaError


class JobError(TolariaError):
    """Base class for mistakes in a training job; the message says what to correct."""


class UnknownJobError(JobError):
    """`training.job` names nothing that can be loaded."""


class BrokenJobError(JobError):
    """A job's factory or method raises, or returns an invalid value."""


class EmptyDatasetError(JobError):
    """A job's dataset has no batch."""


class LossShapeError(JobError):
    """A job returns a loss that is not a differentiable scalar, or a mapping without the required sources."""


class GradientError(TolariaError):
    """Base class for gradients that cannot be merged."""


class NoGradientsError(GradientError, RuntimeError):
    """There are no gradients to merge: no rows, or rows without elements."""

    def __init__(self, message: str = "no gradients available for aggregation") -> None:
        super().__init__(message)


class UnmergeableParameterError(GradientError, JobError):
    """The gradients of several sources cannot be merged over a parameter, which the message names."""


class GradientMismatchError(GradientError):
    """Gradient `index`, the first of several, differs in dtype, device, shape or count from what is required."""

    def __init__(self, index: int, detail: str) -> None:
        self.index = index
        super().__init__(f"gradient {index}: {detail}", index, detail)


class GradientWeightError(GradientError):
    """A weight is invalid; `index` is the first such weight, or None when the weights together are invalid."""

    def __init__(self, index: int | None, detail: str) -> None:
        self.index = index
        super().__init__(f"weights: {detail}" if index is None else f"weight {index}: {detail}", index, detail)


class UnknownSourceError(GradientError):
    """The rows or losses do not name exactly the sources of this step."""


class OptimizationError(TolariaError):
    """Base class for rejected changes of learning rates or the optimizer, which are unchanged."""


class ScheduleError(OptimizationError):
    """The field `field` of a learning-rate schedule is invalid."""

    def __init__(self, field: str, detail: str) -> None:
        self.field = field
        super().__init__(f"{field}: {detail}", field, detail)


class UnsuitableOptimizerError(OptimizationError):
    """The optimizer cannot be controlled: a group has no `lr` or no unique name, or a parameter is not the model's."""


class UnknownGroupError(OptimizationError):
    """No param group is named `group`; the message lists the registered groups."""

    def __init__(self, group: str, known: Sequence[str]) -> None:
        super().__init__(f"no param group {group!r}; there are: {', '.join(sorted(known)) or 'none'}", group, known)


class GroupConflictError(OptimizationError):
    """A param group is registered twice, or without a base learning rate."""


class AdjustmentRefusedError(OptimizationError):
    """The field `field` of a learning-rate adjustment is invalid or out of bounds."""

    def __init__(self, field: str, detail: str) -> None:
        self.field = field
        super().__init__(f"{field}: {detail}", field, detail)


class HyperparameterError(OptimizationError):
    """The optimizer has no hyperparameter `name`, or does not accept the value."""

    def __init__(self, name: str, detail: str) -> None:
        self.name = name
        super().__init__(f"{name}: {detail}", name, detail)


class ControllerStateError(OptimizationError):
    """The saved state of the learning-rate controller is invalid."""


class RebuildFailedError(OptimizationError):
    """Rebuilding the optimizer failed at `stage` (plan, build, carry, validate, swap); the old one stays in use."""

    def __init__(self, stage: str, detail: str) -> None:
        self.stage, self.detail = stage, detail
        super().__init__(f"rebuilding the optimizer failed ({stage}): {detail}", stage, detail)


class SeedError(TolariaError):
    """A seed cannot be grafted, trained or removed as requested."""


class SlotError(SeedError):
    """A slot of the host is declared incorrectly, or receives activations of another shape."""


class UnknownBlueprintError(SeedError):
    """No blueprint of this name is registered; the message lists the registered ones."""


class BlueprintError(SeedError):
    """A blueprint cannot be imported or built, or its branch violates the blueprint contract."""


class BlueprintMisfitError(BlueprintError):
    """The blueprint `blueprint` cannot build a branch for `slot`."""

    def __init__(self, blueprint: str, slot: str, detail: str) -> None:
        super().__init__(f"blueprint {blueprint!r} does not fit slot {slot!r}: {detail}", blueprint, slot, detail)


class OwnershipError(SeedError):
    """A parameter has two owners or none."""


class TopologyStateError(SeedError):
    """A saved topology cannot be loaded into this model, which is unchanged."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"the saved topology cannot be loaded: {detail}", detail)


class LaneError(TolariaError):
    """The compute lane cannot execute a command."""


class LaneFailedError(LaneError):
    """The job's code raised an exception in the lane."""


class PeerLostError(LaneError):
    """Another rank of the group has gone; the group has to start again."""


class RanksDifferError(LaneError):
    """The ranks of a group do not do the same: they have read other data, or have other states."""


class RankFailedError(LaneError):
    """The job, or a seed, has raised an exception on another rank of the group, which knows it."""


class LaneStoppedError(LaneError):
    """The lane stopped before it executed a command."""


class LaneLostError(LaneError):
    """The lane's process ended, and with it whatever it had not answered."""


class WireError(LaneError):
    """What the other side of the lane's connection sent, or was to be sent to it, is no frame."""


class JoinError(LaneError):
    """A machine cannot join a group."""


class ChannelError(JoinError):
    """The connection between the service and another machine has ended, or what came over it is not authentic."""


class JoinRefusedError(JoinError):
    """A machine may not join; `reason` is secret, version, job or full."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"the join was refused ({reason}): {detail}", reason, detail)


class ServiceAbsentError(JoinError):
    """No service has been there to be joined for as long as a machine was to wait."""
