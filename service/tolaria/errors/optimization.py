"""Why a learning rate or an optimizer cannot be had as asked. Must not know optimizers."""

from __future__ import annotations

from tolaria.errors.base import TolariaError


class OptimizationError(TolariaError):
    """Base of the reasons why a learning rate or an optimizer cannot be had as asked; nothing has changed."""


class ScheduleError(OptimizationError):
    """Raised when a learning-rate schedule is impossible. `field` names the part that is wrong."""

    def __init__(self, field: str, detail: str) -> None:
        self.field = field
        super().__init__(f"{field}: {detail}")


class UnsuitableOptimizerError(OptimizationError):
    """Raised when an optimizer cannot be governed: no `lr`, groups without or with equal names, nameless parameters."""


class UnknownGroupError(OptimizationError):
    """Raised when a param group is meant that nobody registered; the message lists those that are."""

    def __init__(self, group: str, known: list[str]) -> None:
        self.group = group
        super().__init__(f"no param group {group!r}; there are: {', '.join(sorted(known)) or 'none'}")


class GroupConflictError(OptimizationError):
    """Raised when a param group is registered twice, or without what its learning rate would follow from."""


class AdjustmentRefusedError(OptimizationError):
    """Raised when a change of learning rate is out of bounds or makes no sense. `field` names what is wrong."""

    def __init__(self, field: str, detail: str) -> None:
        self.field = field
        super().__init__(f"{field}: {detail}")


class HyperparameterError(OptimizationError):
    """Raised when an optimizer has no such hyperparameter, or not with such a value. `name` is the one asked for."""

    def __init__(self, name: str, detail: str) -> None:
        self.name = name
        super().__init__(f"{name}: {detail}")


class ControllerStateError(OptimizationError):
    """Raised when what should be the learning-rate controller's saved state is not."""


class RebuildFailedError(OptimizationError):
    """Raised when an optimizer could not be rebuilt; the old one stands untouched.

    `stage` is the stable name of where it failed: plan, build, carry, validate or swap. What failed is chained.
    """

    def __init__(self, stage: str, detail: str) -> None:
        self.stage = stage
        self.detail = detail
        super().__init__(f"rebuilding the optimizer failed ({stage}): {detail}")
