"""`UnifiedLRController`: the only writer of learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from tolaria.errors import (
    AdjustmentRefusedError,
    ControllerStateError,
    GroupConflictError,
    OptimizationError,
    ScheduleError,
    UnknownGroupError,
)
from tolaria.optimization.adjustments import RateChange, composed, without_replaced
from tolaria.optimization.groups import GroupPlan, RateWriter, name_groups, name_of, rate_in
from tolaria.optimization.optimizer_manager import OptimizerManager
from tolaria.optimization.schedules import Schedule, Warmup
from tolaria.optimization.state_transfer import Build
from tolaria.values.optimization import (
    ActiveAdjustment,
    Adjustment,
    GroupRole,
    LearningRateViolation,
    RebuildOutcome,
    RebuildResult,
)

_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRateSettings:
    """The settings of the controller.

    Args:
        schedule: of the host; seeds follow it with their factor.
        seed_factor: base learning rate of a seed as a fraction of the host's, in (0, 1].
        seed_warmup: from the step at which a seed's group was registered; multiplies with the schedule.
        floor: least rate after adjustments, or the scheduled rate where that is lower.
        ceiling: greatest rate.
        adjustments_max: greatest number of active adjustments.
    """

    schedule: Schedule
    seed_factor: float
    seed_warmup: Warmup
    floor: float
    ceiling: float
    adjustments_max: int = 64

    def __post_init__(self) -> None:
        if not 0.0 < self.seed_factor <= 1.0:
            raise ScheduleError("seed_factor", f"must be above 0 and at most 1, is {self.seed_factor}")
        if not (0.0 <= self.floor <= self.ceiling and math.isfinite(self.ceiling)):
            raise ScheduleError(
                "floor", f"must be at least 0 and at most the ceiling, is {self.floor} of {self.ceiling}"
            )


@dataclass(frozen=True, slots=True)
class GovernedGroup:
    """A registered param group: its role, base learning rate, and the global step of its registration."""

    role: GroupRole
    base_lr: float
    registered_at: int


class UnifiedLRController:
    """Sets the learning rates of an optimizer's param groups, by their `name`.

    `before_step` is called before each optimizer step. It does not synchronise with a device, except to read a tensor
    that other code changed.
    """

    def __init__(self, manager: OptimizerManager, settings: LearningRateSettings) -> None:
        """Registers the optimizer's groups as host groups with their present `lr` as base.

        Raises:
            UnsuitableOptimizerError: a group has no `lr`, or two have the same name.
            ScheduleError: a group's `lr` is negative, NaN or above the ceiling.
        """
        name_groups(manager.optimizer)
        self._manager = manager
        self._settings = settings
        self._groups: dict[str, GovernedGroup] = {}
        self._adjustments: list[ActiveAdjustment] = []
        self._writer = RateWriter()
        for group in manager.optimizer.param_groups:
            self.register_group(name_of(group), GroupRole.HOST, at_step=0, base_lr=rate_in(group))

    @property
    def groups(self) -> Mapping[str, GovernedGroup]:
        """The registered groups by name, oldest first."""
        return self._groups

    @property
    def adjustments(self) -> tuple[ActiveAdjustment, ...]:
        """The active adjustments, oldest first."""
        return tuple(self._adjustments)

    def register_group(self, name: str, role: GroupRole, *, at_step: int, base_lr: float | None = None) -> None:
        """Registers a param group, before or after it is added to the optimizer.

        Args:
            name: its `name` in the optimizer.
            role: HOST follows the schedule, SEED a fraction of it with a warm-up, FROZEN has rate 0. A rate of 0 does
                not stop every optimizer (Rprop has other steps), so frozen parameters must get no gradient.
            at_step: global step from which the warm-up of a seed counts.
            base_lr: the rate that the schedule's factor multiplies. None: that of the first host group, times
                `seed_factor` for a seed.

        Raises:
            GroupConflictError: the name is registered already, or there is no host group to take a base from.
            ScheduleError: `base_lr` is negative, NaN or above the ceiling.
        """
        if name in self._groups:
            raise GroupConflictError(f"param group {name!r} is registered already")
        base = self._default_base(name, role) if base_lr is None else base_lr
        if not 0.0 <= base <= self._settings.ceiling:
            raise ScheduleError("lr", f"of group {name!r} must be between 0 and {self._settings.ceiling}, is {base}")
        self._groups[name] = GovernedGroup(role, base, at_step)

    def unregister_group(self, name: str) -> None:
        """Removes a group that has left the optimizer.

        Raises:
            UnknownGroupError: it is not registered.
        """
        self._known(name)
        del self._groups[name]
        self._writer.forget(name)

    def set_role(self, name: str, role: GroupRole) -> None:
        """Changes the role of a group from the next `apply` on; base rate and warm-up stay.

        Raises:
            UnknownGroupError: it is not registered.
        """
        self._groups[name] = replace(self._known(name), role=role)

    def before_step(self, global_step: int) -> list[LearningRateViolation]:
        """Verifies and then applies the rates of the step after `global_step` steps."""
        violations = self.verify()
        self.apply(global_step)
        return violations

    def apply(self, global_step: int) -> None:
        """Writes the rates of this step into the optimizer. Rates that did not change are not written.

        Raises:
            UnknownGroupError: the optimizer has a group that is not registered.
            UnsuitableOptimizerError: it has a group without a name.
        """
        if self._adjustments:
            self._adjustments = [each for each in self._adjustments if not each.expired_at(global_step)]
        for group in self._manager.optimizer.param_groups:
            name = name_of(group)
            self._writer.write(group, self._rate_at(name, self._known(name), global_step, self._adjustments))

    def verify(self) -> list[LearningRateViolation]:
        """Restores rates that differ from those last written, and returns those that differed by more than 1e-6."""
        found = [self._writer.restore(group) for group in self._manager.optimizer.param_groups]
        return [violation for violation in found if violation is not None]

    def adjust(self, adjustment: Adjustment, *, at_step: int) -> RateChange:
        """Adds an adjustment, effective from the next `apply` with a step of at least `at_step`.

        Adjustments compose as in `adjustments.composed`. A value without expiry replaces all older ones of its groups.

        Returns:
            The rates of the groups concerned at `at_step`, before and after.

        Raises:
            UnknownGroupError: no group of that name is registered.
            AdjustmentRefusedError: a rate would be out of bounds, all groups are frozen, or too many are active.
        """
        names = [name for name in self._groups if adjustment.applies_to(name)]
        if not names:
            raise UnknownGroupError(adjustment.group or "all", list(self._groups))
        names = [name for name in names if self._groups[name].role is not GroupRole.FROZEN]
        if not names:
            raise AdjustmentRefusedError("group", f"{adjustment.group!r} is frozen")
        active = [each for each in self._adjustments if not each.expired_at(at_step)]
        changed = [*without_replaced(active, adjustment), ActiveAdjustment(adjustment, at_step)]
        if len(changed) > self._settings.adjustments_max:
            raise AdjustmentRefusedError(
                "group", f"{len(active)} adjustments are active already; a value without expiry replaces them"
            )
        self._check_bounds(adjustment, names, changed, at_step)
        self._adjustments = changed
        return RateChange(self._rates_at(names, at_step, active), self._rates_at(names, at_step, changed))

    def learning_rates(self) -> dict[str, float]:
        """Returns the rates last written, by group; empty before the first `apply`."""
        return self._writer.rates

    def rate_at(self, name: str, global_step: int) -> float:
        """Returns the group's rate at a step with the present adjustments.

        Raises:
            UnknownGroupError: it is not registered.
        """
        return self._rate_at(name, self._known(name), global_step, self._adjustments)

    def state_dict(self) -> dict[str, Any]:
        """Returns groups and active adjustments as JSON values. The schedule is a setting and not included."""
        groups = {name: asdict(group) | {"role": group.role.value} for name, group in self._groups.items()}
        adjustments = [{"at_step": each.at_step, "adjustment": asdict(each.adjustment)} for each in self._adjustments]
        return {"version": _VERSION, "groups": groups, "adjustments": adjustments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a saved state; the rates are written by the next `apply`.

        Raises:
            ControllerStateError: the state is damaged or of another version; nothing has changed.
        """
        if state.get("version") != _VERSION:
            raise ControllerStateError(f"learning-rate state is of version {state.get('version')!r}, not {_VERSION}")
        try:
            groups = {str(name): self._read_group(entry) for name, entry in state["groups"].items()}
            adjustments = [
                ActiveAdjustment(Adjustment(**entry["adjustment"]), int(entry["at_step"]))
                for entry in state["adjustments"]
            ]
        except (KeyError, TypeError, ValueError, AttributeError, AdjustmentRefusedError) as error:
            raise ControllerStateError(f"learning-rate state is damaged: {type(error).__name__}: {error}") from error
        self._groups, self._adjustments = groups, adjustments
        for name in [name for name in self._writer.rates if name not in groups]:
            self._writer.forget(name)

    def _read_group(self, entry: Mapping[str, Any]) -> GovernedGroup:
        base_lr, ceiling = float(entry["base_lr"]), self._settings.ceiling
        if not 0.0 <= base_lr <= ceiling:
            raise ValueError(f"base_lr {base_lr} is not between 0 and {ceiling}")
        return GovernedGroup(GroupRole(entry["role"]), base_lr, int(entry["registered_at"]))

    def _known(self, name: str) -> GovernedGroup:
        if name not in self._groups:
            raise UnknownGroupError(name, list(self._groups))
        return self._groups[name]

    def _default_base(self, name: str, role: GroupRole) -> float:
        host = next((group for group in self._groups.values() if group.role is GroupRole.HOST), None)
        if host is None:
            raise GroupConflictError(
                f"param group {name!r} needs a base learning rate: there is no host to take it from"
            )
        return host.base_lr * (self._settings.seed_factor if role is GroupRole.SEED else 1.0)

    def _rates_at(self, names: Sequence[str], step: int, active: Sequence[ActiveAdjustment]) -> dict[str, float]:
        return {name: self._rate_at(name, self._groups[name], step, active) for name in names}

    def _rate_at(self, name: str, group: GovernedGroup, step: int, active: Sequence[ActiveAdjustment]) -> float:
        scheduled = self._scheduled(group, step)
        if not active or group.role is GroupRole.FROZEN:
            return scheduled
        lowest = min(self._settings.floor, scheduled)
        return min(max(composed(active, name, scheduled, step), lowest), self._settings.ceiling)

    def _scheduled(self, group: GovernedGroup, step: int) -> float:
        if group.role is GroupRole.FROZEN:
            return 0.0
        rate = group.base_lr * self._settings.schedule.factor_at(step)
        if group.role is GroupRole.SEED:
            rate *= self._settings.seed_warmup.factor_at(max(0, step - group.registered_at))
        return rate

    def _check_bounds(
        self, adjustment: Adjustment, names: Sequence[str], active: Sequence[ActiveAdjustment], at_step: int
    ) -> None:
        wrong = "value" if adjustment.factor is None else "factor"
        for name in names:
            scheduled = self._scheduled(self._groups[name], at_step)
            rate = adjustment.value if adjustment.value is not None else composed(active, name, scheduled, at_step)
            lowest = self._settings.floor if adjustment.value is not None else min(self._settings.floor, scheduled)
            if not lowest <= rate <= self._settings.ceiling:
                raise AdjustmentRefusedError(
                    wrong, f"would set group {name!r} to {rate:g}, outside {lowest:g} to {self._settings.ceiling:g}"
                )


def regroup(
    manager: OptimizerManager,
    controller: UnifiedLRController,
    groups: Sequence[GroupPlan],
    at_step: int,
    *,
    urgent: bool = False,
    change_to: Build | None = None,
) -> RebuildResult:
    """Rebuilds the optimizer over exactly `groups` and changes the registered groups with it, or changes nothing.

    Arguments are those of `OptimizerManager.rebuild`. Groups that are registered already, as after a restore, keep
    their base rate and the start of their warm-up.

    Raises:
        RebuildFailedError, GroupConflictError: nothing has changed.
    """
    before = controller.state_dict()
    try:
        for group in groups:
            if group.name not in controller.groups:
                controller.register_group(group.name, group.role, at_step=at_step)
            elif controller.groups[group.name].role is not group.role:
                controller.set_role(group.name, group.role)
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
