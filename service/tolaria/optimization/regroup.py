"""One fence operation: the optimizer's groups and their learning rates change together, or not at all."""

from __future__ import annotations

from collections.abc import Sequence

from tolaria.errors import OptimizationError
from tolaria.optimization.carry import Build
from tolaria.optimization.groups import GroupPlan
from tolaria.optimization.lr_controller import UnifiedLRController
from tolaria.optimization.optimizer_manager import OptimizerManager
from tolaria.values.optimization import RebuildOutcome, RebuildResult


def regroup(
    manager: OptimizerManager,
    controller: UnifiedLRController,
    groups: Sequence[GroupPlan],
    at_step: int,
    *,
    urgent: bool = False,
    change_to: Build | None = None,
) -> RebuildResult:
    """Rebuild over exactly `groups`, register those that are new, let go of those that are gone, write their rates.

    Arguments are those of `OptimizerManager.rebuild`. Groups that the controller knows already, as after its state was
    restored, keep their base rate and the beginning of their warm-up.

    Returns:
        The rebuild's result; when it was skipped nothing has changed anywhere.

    Raises:
        RebuildFailedError, GroupConflictError: nothing has changed anywhere.
    """
    before = controller.state_dict()
    try:
        _register(controller, groups, at_step)
        result = manager.rebuild(groups, at_step, urgent=urgent, change_to=change_to)
    except OptimizationError:
        controller.load_state_dict(before)
        raise
    if result.outcome is RebuildOutcome.SKIPPED:
        controller.load_state_dict(before)
        return result
    wanted = {group.name for group in groups}
    for name in [name for name in controller.groups if name not in wanted]:
        controller.unregister_group(name)
    controller.apply(at_step)
    return result


def _register(controller: UnifiedLRController, groups: Sequence[GroupPlan], at_step: int) -> None:
    for group in groups:
        if group.name not in controller.groups:
            controller.register_group(group.name, group.role, at_step=at_step)
        elif controller.groups[group.name].role is not group.role:
            controller.set_role(group.name, group.role)
